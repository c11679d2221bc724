"""Prefill first, admission by expected output: SGLang.

Source: SGLang (sglang 0.5.23, srt/managers/{scheduler,schedule_policy,schedule_batch}.py).

Idea: whenever prompts can start, a step of nothing but prompts runs; otherwise every running job decodes one token.
A prompt starts only if the memory suffices for what the running jobs are expected to write: a share `ratio` of what
they may still write. The ratio decays while all goes well and jumps after a retraction.

    rest(j)    = min(max_tokens - output, clip_tokens)                                    tokens
    remaining  = free - sum over decoding jobs of ratio * rest(j) - sum over just started of rest(j)
    start j    if need(j) + rest(j) + one block < remaining, with need(j) in whole blocks, adopted ones included
    decay      ratio := max(r_min, ratio - (r_init - r_min) / decay_steps) at every decode step without retraction
               r_init = min(1, init_ratio * conservativeness), r_min = r_init * min_factor; r_init again when idle
    retraction if the decodes do not fit: jobs leave until they do, one stays;
               ratio := min(1, (sum of output + retract_steps * n) / (sum of max_tokens + 1)) over the n that stay

A prompt longer than the chunk left is cut at a block boundary; it is the unfinished one, is not charged for its rest
and goes first in the next step. A prompt that does not fit marks the batch full until some job leaves.

Parameters (tokens unless said): chunk_tokens 8192 (SGLang: 2048 to 16384 by GPU memory; None = whole prompts),
max_prefill_tokens 16384, max_jobs 2048 jobs, clip_tokens 4096, conservativeness 1.0, init_ratio 0.7, min_factor
0.14, decay_steps 600 steps, retract_steps 20 steps.

Where we differ: who is retracted is the evict policy's answer (retract gives SGLang's), and the admit policy is asked
besides, so that jobs that can never fit are refused. When nothing runs, the admit policy alone decides: SGLang cuts
max_tokens at arrival so that this case cannot starve. A retracted job waits where the order policy puts it. No
mixing of decodes into prefill steps, no in-batch prefix deferral, no future-peak test for ignore_eos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.core.views import Batch, Chunk, Eviction, JobView, Lane, LedgerFork
from penstock.policy.batch import STABLE, Decision, View
from penstock.policy.batch.decodes import all_decodes, is_quiet


@dataclass(slots=True)
class Prefill:
    """One prefill step in the making. `promised`: tokens of free memory that others are expected to write."""

    fork: LedgerFork
    promised: float
    chunk_left: int
    input_left: int
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[JobView] = field(default_factory=list)

    def add(self, job: JobView, tokens: int, rest: int) -> None:
        self.chunks.append(Chunk(job, tokens))
        self.promised += rest
        self.chunk_left -= tokens
        self.input_left -= tokens

    @property
    def remaining(self) -> float:
        return self.fork.free * self.fork.block_size - self.promised


@dataclass(slots=True)
class Sglang:
    chunk_tokens: int | None = 8192
    max_prefill_tokens: int = 16384
    max_jobs: int = 2048
    clip_tokens: int = 4096
    conservativeness: float = 1.0
    init_ratio: float = 0.7
    min_factor: float = 0.14
    decay_steps: int = 600
    retract_steps: int = 20
    _ratio: float = field(init=False, repr=False)
    _planned: dict[int, int] = field(init=False, default_factory=dict, repr=False)
    _full: int | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        for name in (
            "chunk_tokens",
            "max_prefill_tokens",
            "max_jobs",
            "clip_tokens",
            "decay_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (
            self.conservativeness > 0 and 0 < self.init_ratio <= 1 and 0 <= self.min_factor <= 1
        ):
            raise ValueError("conservativeness, init_ratio or min_factor is out of range")
        self._ratio = self._highest

    @property
    def _highest(self) -> float:
        return min(1.0, self.init_ratio * self.conservativeness)

    def decide(self, view: View) -> Decision:
        if view.busy_lanes:
            return Decision(why="the lane is busy")
        self._settle(view)
        max_jobs = min(self.max_jobs, view.caps.max_jobs)
        may_admit = len(view.waiting) > 0 and self._full is None and len(view.running) < max_jobs
        if may_admit or any(job.todo > 1 for job in view.running):
            prefill = self._prefill(view, max_jobs if may_admit else 0)
            if prefill.chunks:
                return Decision(
                    Batch((Lane(tuple(prefill.chunks)),)), tuple(prefill.admitted), why="prefill"
                )
        return self._decode(view)

    def _settle(self, view: View) -> None:
        """Count the decode steps that ran since the last call, and see whether somebody left."""
        if not view.running:
            self._ratio, self._full = self._highest, None
        elif self._full is not None and len(view.running) < self._full:
            self._full = None
        if self._planned:
            for job in view.running:
                known = self._planned.get(job.seq)
                if known is not None:
                    self._decay(job.known - known - 1)  # the first was counted when it was planned
                    break
            self._planned = {}

    def _decay(self, steps: int) -> None:
        lowest = self._highest * self.min_factor
        for _ in range(steps):
            self._ratio = max(lowest, self._ratio - (self._highest - lowest) / self.decay_steps)
            if self._ratio == lowest:
                return

    def _rest(self, job: JobView) -> int:
        return min(job.max_tokens - job.num_output, self.clip_tokens)

    def _prefill(self, view: View, max_jobs: int) -> Prefill:
        limit = view.caps.max_batch_tokens
        prefill = Prefill(
            fork=view.ledger.fork(),
            promised=sum(self._ratio * self._rest(job) for job in view.running if job.todo < 2),
            chunk_left=limit if self.chunk_tokens is None else min(limit, self.chunk_tokens),
            input_left=self.max_prefill_tokens,
        )
        for job in view.running:
            if job.todo > 1:
                self._continue(prefill, job)
        self._start(view, prefill, max_jobs)
        return prefill

    def _continue(self, prefill: Prefill, job: JobView) -> None:
        """The next piece of an unfinished prompt: as much as chunk and memory allow."""
        fork, start = prefill.fork, job.computed + job.in_flight
        held_upto = (fork.held(job) + fork.free) * fork.block_size
        tokens = min(job.todo, prefill.chunk_left, held_upto - start)
        if tokens > 0 and fork.reserve(job, start + tokens):
            prefill.add(job, tokens, self._rest(job) if tokens == job.todo else 0)

    def _start(self, view: View, prefill: Prefill, max_jobs: int) -> None:
        fork, num_running = prefill.fork, len(view.running)
        for job in view.waiting:
            if num_running + len(prefill.admitted) >= max_jobs:
                return
            cached = fork.cached(job)
            extend = job.known - cached
            tokens = self._cut(prefill, extend, fork.block_size)
            if tokens < 1:
                return
            answer = view.admit(job, tokens, fork)
            if answer == "no":
                continue
            is_idle = num_running + len(prefill.chunks) == 0
            if answer == "later" or not (is_idle or self._fits(prefill, job)):
                self._full = num_running + len(prefill.admitted) or None
                return
            if not fork.reserve(job, cached + tokens):
                return
            prefill.admitted.append(job)
            prefill.add(job, tokens, self._rest(job) if tokens == extend else 0)
            if tokens < extend:
                return

    @staticmethod
    def _cut(prefill: Prefill, extend: int, block_size: int) -> int:
        """Tokens to compute of a prompt that lacks `extend`; 0 = it has to wait for the next step."""
        if prefill.chunks and extend >= prefill.input_left:
            return 0
        if extend <= prefill.chunk_left:
            return extend
        whole = prefill.chunk_left // block_size * block_size
        return whole if whole or prefill.chunks else prefill.chunk_left

    def _fits(self, prefill: Prefill, job: JobView) -> bool:
        fork = prefill.fork
        need = (fork.need(job, job.known) + 1) * fork.block_size
        return need + self._rest(job) < prefill.remaining

    def _decode(self, view: View) -> Decision:
        chunks = all_decodes(view.running, view.ledger.fork())
        if chunks is None or len(chunks) > view.caps.max_batch_tokens:
            return self._squeeze(view)
        self._decay(1)
        max_jobs = min(self.max_jobs, view.caps.max_jobs)
        is_closed = not view.waiting or self._full is not None or len(view.running) >= max_jobs
        if not chunks or not is_closed:
            return Decision(Batch((Lane(chunks),) if chunks else ()), why="decode")
        self._planned = {job.seq: job.known for job in view.running}
        return Decision(Batch((Lane(chunks),)), why="decode", stable_for=STABLE)

    def _squeeze(self, view: View) -> Decision:
        """Decode who can: retract until the decodes fit."""
        fork = view.ledger.fork()
        staying = [job for job in view.running if job.todo == 1][: view.caps.max_batch_tokens]
        evicted: list[Eviction[JobView]] = []
        if not staying and view.running:
            evicted = self._unstick(view, fork)
        needs = {job.seq: fork.need(job, job.known) for job in staying}
        while staying and sum(needs.values()) > fork.free:
            if not self._retract(view, fork, staying, evicted, needs):
                break
        chunks = tuple(
            [
                Chunk(job, 1)
                for job in staying
                if is_quiet(job.known - 1, fork.block_size) or fork.reserve(job, job.known)
            ]
        )
        if evicted and staying:
            written = sum(job.num_output for job in staying) + self.retract_steps * len(staying)
            self._ratio = min(1.0, written / (sum(job.max_tokens for job in staying) + 1))
        elif not evicted:
            self._decay(1)
        batch = Batch((Lane(chunks),) if chunks else ())
        return Decision(batch, evicted=tuple(evicted), why="retracted" if evicted else "decode")

    @staticmethod
    def _unstick(view: View, fork: LedgerFork) -> list[Eviction[JobView]]:
        """Unfinished prompts hold all memory (several only came from elsewhere): room for the first of them."""
        unfinished = [job for job in view.running if job.todo > 1]
        if not unfinished:
            return []
        asker = unfinished[0]
        return list(
            view.victims(asker, fork.need(asker, asker.known) - fork.free, unfinished, fork)
        )

    @staticmethod
    def _retract(
        view: View,
        fork: LedgerFork,
        staying: list[JobView],
        evicted: list[Eviction[JobView]],
        needs: dict[int, int],
    ) -> bool:
        """Let somebody go, all but one of the decoding jobs first; False when nobody is left to go.

        `needs`: the blocks that one more position of each of those staying takes.
        """
        gone = {eviction.item.seq for eviction in evicted}
        asker: JobView = staying[0]
        among: Sequence[JobView] = list(staying)
        if len(staying) == 1:
            among = [job for job in view.running if job is not asker and job.seq not in gone]
        if not among:
            among = list(staying)  # it cannot grow even alone: it gives up
        for eviction in view.victims(asker, sum(needs.values()) - fork.free, among, fork):
            fork.release(eviction.item)
            evicted.append(eviction)
            if needs.pop(eviction.item.seq, None) is not None:
                staying.remove(eviction.item)
            if len(staying) < 2 or sum(needs.values()) <= fork.free:
                return True
        return len(evicted) > len(gone)
