"""Whole prompts as soon as they fit, decodes only when none does: vLLM of late 2023.

Source: vLLM 0.2 `Scheduler._schedule` (vllm 0.2.7, vllm/core/scheduler.py), the baseline of DeepSpeed-FastGen and of
Sarathi-Serve.

Idea: a prompt is computed in one step, alone or with other prompts, and before anybody decodes: first tokens come early
and slots fill fast. The price is paid by those who decode: they stand still for as long as prompts keep coming.

    prompt step  waiting jobs in order while slots, tokens and memory (of the whole prompt) suffice; the first that does
                 not fit ends the walk
    decode step  when no prompt can start: one token of every running job, in the order of admission; those that get no
                 block preempt others

Parameters
    max_tokens   tokens of a prompt step, default None: the longest context, at least 2048 (vLLM 0.2's rule)
    max_jobs     jobs running at once, default 256
    decodes_between  decode steps between two prompt steps while somebody runs, at least, default 0; LightLLM has 2
                 (max_wait_tokens), so that no answer stands still for longer than one prompt step

Where we differ: victims and admission are answers of other policies (recompute-last and watermark give vLLM 0.2's;
no swapping). Prompts of a step are not padded to each other's length, so no bound on padding. A prompt longer than the
executor takes in a step, which vLLM 0.2 refuses, is computed in pieces that nothing comes between.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.views import Batch, Chunk, Eviction, JobView, Lane, LedgerFork
from penstock.policy.batch import STABLE, Decision, View
from penstock.policy.batch.decodes import all_decodes

LEAST_TOKENS = 2048


@dataclass(slots=True)
class Prompts:
    """A prompt step in the making."""

    fork: LedgerFork
    tokens_left: int
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[JobView] = field(default_factory=list)
    is_blocked: bool = False  # the next prompt has to wait

    def add(self, job: JobView, start: int, tokens: int) -> bool:
        if not self.fork.reserve(job, start + tokens):
            return False
        self.chunks.append(Chunk(job, tokens))
        self.tokens_left -= tokens
        return True


@dataclass(slots=True)
class PrefillFirst:
    max_tokens: int | None = None
    max_jobs: int = 256
    decodes_between: int = 0
    _decoded: int = field(init=False, default=0, repr=False)  # up to decodes_between

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.decodes_between < 0:
            raise ValueError(f"decodes_between must be 0 or more, got {self.decodes_between}")

    def decide(self, view: View) -> Decision:
        if view.busy_lanes:
            return Decision(why="the lane is busy")
        most = self.max_tokens or max(view.caps.max_context, LEAST_TOKENS)
        prompts = Prompts(view.ledger.fork(), min(most, view.caps.max_batch_tokens))
        slots = min(self.max_jobs, view.caps.max_jobs) - len(view.running)
        is_due = self._decoded >= self.decodes_between or not view.running
        may_start = len(view.waiting) > 0 and slots > 0 and is_due
        is_unfinished = False
        for job in view.running:
            if job.todo > 1 and prompts.tokens_left > 0:
                is_unfinished = True
                start = job.computed + job.in_flight
                prompts.add(job, start, min(job.todo, prompts.tokens_left))
        if may_start and not is_unfinished:
            self._start(view, prompts, slots)
        if prompts.chunks:
            lane = Lane(tuple(prompts.chunks))
            self._decoded = 0
            num = len(view.running) + len(prompts.admitted)
            outlasts = not self.decodes_between and num <= view.caps.max_batch_tokens
            return Decision(
                Batch((lane,)), tuple(prompts.admitted), why="prefill", outlasts=outlasts
            )
        self._decoded = min(self._decoded + 1, self.decodes_between)
        return self._decode(view, is_due and (not may_start or prompts.is_blocked))

    @staticmethod
    def _start(view: View, prompts: Prompts, slots: int) -> None:
        fork = prompts.fork
        for job in view.waiting:
            if len(prompts.admitted) >= slots or prompts.tokens_left < 1:
                return
            cached = fork.cached(job)
            tokens = job.known - cached
            if tokens > prompts.tokens_left:
                if prompts.chunks:
                    return
                tokens = prompts.tokens_left
            answer = view.admit(job, tokens, fork)
            if answer == "no":
                continue
            if answer == "later" or fork.need(job, job.known) > fork.free:
                prompts.is_blocked = True
                return
            if not prompts.add(job, cached, tokens):
                return
            prompts.admitted.append(job)

    @staticmethod
    def _decode(view: View, is_closed: bool) -> Decision:
        """`is_closed`: nobody starts before somebody ends."""
        most = view.caps.max_batch_tokens
        if len(view.running) <= most:
            chunks = all_decodes(view.running, view.ledger.fork())
            if chunks:
                batch = Batch((Lane(chunks),))
                outlasts = is_closed and not view.waiting
                return Decision(batch, stable_for=STABLE if is_closed else 1, outlasts=outlasts)
        squeeze = Squeeze(view.ledger.fork())
        for job in (
            sorted(view.running, key=last_served) if len(view.running) > most else view.running
        ):
            if len(squeeze.planned) >= most:
                break
            if job.todo > 0 and job.seq not in squeeze.gone:
                squeeze.plan(view, job)
        lane = Lane(tuple(squeeze.planned.values()))
        why = "preempted" if squeeze.evicted else ""
        return Decision(Batch((lane,) if lane.chunks else ()), (), tuple(squeeze.evicted), why)


def last_served(job: JobView) -> float:
    return job.arrived_at if job.last_token_at is None else job.last_token_at


@dataclass(slots=True)
class Squeeze:
    """Decodes while memory is short."""

    fork: LedgerFork
    planned: dict[int, Chunk] = field(default_factory=dict)
    evicted: list[Eviction[JobView]] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)

    def plan(self, view: View, job: JobView) -> None:
        """The next position of a job, or of an unfinished prompt that memory stopped, preempting for it."""
        fork = self.fork
        upto = job.computed + job.in_flight + 1
        while not fork.reserve(job, upto):
            among = [other for other in view.running if other.seq not in self.gone]
            need = fork.need(job, upto) - fork.free
            victims = view.victims(job, need, among, fork)
            for eviction in victims:
                self._drop(eviction)
            if not victims or job.seq in self.gone:
                return
        self.planned[job.seq] = Chunk(job, 1)

    def _drop(self, eviction: Eviction[JobView]) -> None:
        self.fork.release(eviction.item)
        self.evicted.append(eviction)
        self.gone.add(eviction.item.seq)
        self.planned.pop(eviction.item.seq, None)
