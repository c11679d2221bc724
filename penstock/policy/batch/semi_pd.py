"""Prompts in one lane, answers in the other, memory shared: semi-PD.

Source: semi-PD (Hong et al., 2025; infinigence/Semi-PD, commit 2565f9f, a fork of SGLang).

Idea: prefill and decode disturb each other in one step, and on two devices they need the weights twice and the KV
moved. So only the arithmetic is separated: two step loops over one device, one copy of the weights and one ledger of
blocks, each with a share of the cores. Gaps then depend on the decode lane alone, first tokens on the prefill lane.

    prefill lane  SGLang's: unfinished prompts, then waiting ones by its ratio rule, up to chunk_tokens
    decode lane   one token of every running job that is not in the other lane; those that do not fit are retracted and
                  come back as prompts
    shares        prefill_share and decode_share, or what a limit policy says (fixed, semi-pd); a change holds from the
                  next launch of its lane on. With is_elastic a lane that is launched while the other has nothing to do
                  gets all cores, until its step ends

A finished prompt decodes from the decode lane's next step on. Decodes book their blocks first.

Parameters (tokens unless said): prefill_share 0.6 and decode_share 0.4 of the device (both 1: no partition), is_elastic
True, and those of sglang: chunk_tokens 8192, max_prefill_tokens 16384, max_jobs 2048 jobs, clip_tokens 4096,
conservativeness 1.0, init_ratio 0.7, min_factor 0.14, decay_steps 600 steps, retract_steps 20 steps.

Where we differ: the original's lanes are two processes, of which the decoding one owns all memory; here one replica
owns it and plans both lanes. Its shares of 80 and 100 % overlap on purpose; ours may (the executor's max_total_share).
A job stands in one lane at a time and only jobs in neither lane are retracted, so no block is given away under a
running plan. An executor with one lane runs it as SGLang. Which lane runs what is heard from events: without `observe`
a busy lane is taken to prefill.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from penstock.core.events import Completed, Event, Stepped
from penstock.core.limits import Holder, Limits, Use
from penstock.core.types import PlanId
from penstock.core.views import Batch, Chunk, Eviction, JobView, Lane, LedgerFork, Singles
from penstock.policy.batch import STABLE, Decision, View
from penstock.policy.batch.decodes import all_decodes, is_quiet
from penstock.policy.batch.sglang import Prefill, Sglang

PREFILL, DECODE = "prefill", "decode"
FLOOR = 0.1  # of the cores, for either lane


class Launched(NamedTuple):
    """A lane that runs: what it does, with which share, and the part of the cores this was when it began."""

    role: str
    share: float
    cores: float
    amount: float
    at: float


@dataclass(slots=True)
class Decodes:
    """The decode lane in the making, booked on `fork`. `is_short`: not all could be planned."""

    fork: LedgerFork
    chunks: tuple[Chunk, ...] | Singles = ()
    evicted: tuple[Eviction[JobView], ...] = ()
    is_short: bool = False


@dataclass(slots=True)
class SemiPd(Sglang):
    num_lanes: ClassVar[int] = 2
    prefill_share: float = 0.6
    decode_share: float = 0.4
    is_elastic: bool = True
    _limits: Limits | None = field(init=False, default=None, repr=False)
    _planned_lanes: list[tuple[str, float]] = field(init=False, default_factory=list, repr=False)
    _roles: dict[int, str] = field(init=False, default_factory=dict, repr=False)  # by lane
    _flying: dict[int, Launched] = field(init=False, default_factory=dict, repr=False)  # by plan
    _uses: dict[str, list[Use]] = field(init=False, default_factory=dict, repr=False)
    _split: tuple[float, float] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        Sglang.__post_init__(self)
        for name in ("prefill_share", "decode_share"):
            if not FLOOR <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from {FLOOR} to 1, got {getattr(self, name)}")

    def bind_limits(self, limits: Limits) -> None:
        """From now on the shares are what `limits` answers."""
        self._limits = limits

    def observe(self, event: Event) -> None:
        if isinstance(event, Stepped):
            if event.plan is not None and self._planned_lanes:
                self._launched(event, event.plan)
        elif isinstance(event, Completed):
            lane = self._flying.pop(event.plan, None)
            if lane is not None and self._limits is not None:
                seconds = (event.ends[-1] - lane.at) / event.steps_run
                use = Use(lane.cores, lane.amount, seconds, event.steps_run)
                self._uses.setdefault(lane.role, []).append(use)
        if self._limits is not None:
            self._limits.observe(event)

    def _launched(self, event: Stepped, plan: PlanId | int) -> None:
        role, share = self._planned_lanes.pop(0)
        self._roles[event.lane] = role
        is_beside = bool(self._flying or self._planned_lanes)
        crowd = max(1.0, sum(self._split)) if is_beside and self._split else 1.0
        amount = sum(tokens for _, tokens in event.chunks)
        self._flying[plan] = Launched(role, share, share / crowd, amount, event.at)

    def decide(self, view: View) -> Decision:
        if view.caps.max_lanes < 2:
            self._planned_lanes = []
            return Sglang.decide(self, view)
        self._settle(view)
        busy = {self._roles.get(lane, PREFILL) for lane in view.busy_lanes}
        if DECODE in busy:
            decodes = Decodes(view.ledger.fork())
        else:
            decodes = self._decode_lane(view, busy)
        prefill = None
        if PREFILL not in busy and not decodes.evicted:
            prefill = self._prefill_lane(view, decodes.fork, len(decodes.chunks))
        return self._join(view, busy, prefill, decodes)

    def _join(
        self, view: View, busy: set[str], prefill: Prefill | None, decodes: Decodes
    ) -> Decision:
        has_prefill = prefill is not None and bool(prefill.chunks)
        active = busy | ({PREFILL} if has_prefill else set())
        active |= {DECODE} if decodes.chunks else set()
        if not (has_prefill or decodes.chunks):
            self._planned_lanes = []
            return Decision(evicted=decodes.evicted, why="retracted" if decodes.evicted else "")
        why = self._share_out(view)
        lanes: list[Lane] = []
        self._planned_lanes = []
        for role, chunks in (
            (PREFILL, tuple(prefill.chunks) if prefill is not None else ()),
            (DECODE, decodes.chunks),
        ):
            if chunks:
                share = self._share(role, is_alone=len(active) == 1)
                lanes.append(Lane(chunks, share))
                self._planned_lanes.append((role, share))
        if decodes.evicted:
            why = f"{why}; retracted" if why else "retracted"
        admitted = tuple(prefill.admitted) if prefill is not None else ()
        stable_for = 1
        if active == {DECODE} and not decodes.is_short and self._is_closed(view):
            stable_for = STABLE
            self._planned = {job.seq: job.known for job in view.running}
        return Decision(Batch(tuple(lanes)), admitted, decodes.evicted, why, stable_for)

    def _is_closed(self, view: View) -> bool:
        """Nobody starts before somebody ends."""
        most = min(self.max_jobs, view.caps.max_jobs)
        return not view.waiting or self._full is not None or len(view.running) >= most

    def _share(self, role: str, *, is_alone: bool) -> float:
        if is_alone and self.is_elastic:
            return 1.0
        prefill, decode = self._split or (self.prefill_share, self.decode_share)
        return prefill if role == PREFILL else decode

    def _share_out(self, view: View) -> str:
        """Ask who gets how much; what changed, in words."""
        before = self._split or self._fitting(view)
        if self._limits is None:
            self._split = before
            return ""
        holders = [
            Holder(PREFILL, FLOOR, before[0], self._uses.pop(PREFILL, ())),
            Holder(DECODE, FLOOR, before[1], self._uses.pop(DECODE, ())),
        ]
        caps = self._limits.ask(view.now, view.rng, holders, view.caps.max_total_share)
        self._split = caps[PREFILL], caps[DECODE]
        if self._split == before:
            return ""
        return (
            f"shares {before[0]:.0%}/{before[1]:.0%} -> {self._split[0]:.0%}/{self._split[1]:.0%}"
        )

    def _fitting(self, view: View) -> tuple[float, float]:
        """The configured shares, cut in proportion where the executor does not let them overlap."""
        scale = min(1.0, view.caps.max_total_share / (self.prefill_share + self.decode_share))
        return self.prefill_share * scale, self.decode_share * scale

    # ------------------------------------------------------------------ lanes

    def _prefill_lane(self, view: View, fork: LedgerFork, num_decodes: int) -> Prefill | None:
        """SGLang's prefill step, booked behind the decodes. No prompt is under way: its lane is idle."""
        limit = view.caps.max_batch_tokens - num_decodes
        most = min(self.max_jobs, view.caps.max_jobs)
        may_admit = len(view.waiting) > 0 and self._full is None and len(view.running) < most
        if limit < 1 or not (may_admit or any(job.todo > 1 for job in view.running)):
            return None
        prefill = Prefill(
            fork=fork,
            promised=sum(self._ratio * self._rest(job) for job in view.running if job.todo < 2),
            chunk_left=limit if self.chunk_tokens is None else min(limit, self.chunk_tokens),
            input_left=self.max_prefill_tokens,
        )
        for job in view.running:
            if job.todo > 1:
                self._continue(prefill, job)
        self._start(view, prefill, most if may_admit else 0)
        return prefill

    def _decode_lane(self, view: View, busy: set[str]) -> Decodes:
        most = view.caps.max_batch_tokens
        idle = [job for job in view.running if not job.in_flight and job.todo == 1]
        if not idle:
            return self._stuck(view, busy)
        if len(idle) <= most:
            fork = view.ledger.fork()
            chunks = all_decodes(idle, fork)
            if chunks is not None:
                self._decay(1)
                return Decodes(fork, chunks)
        if busy and len(idle) == 1:
            # What the other lane computes will end, and free blocks.
            return Decodes(view.ledger.fork(), is_short=True)
        return self._squeezed(view)

    def _squeezed(self, view: View) -> Decodes:
        """Decode who can, retract until the decodes fit. Jobs in the other lane are left alone."""
        fork = view.ledger.fork()
        told = self._squeeze(
            dataclasses.replace(view, running=[j for j in view.running if not j.in_flight])
        )
        for eviction in told.evicted:
            fork.release(eviction.item)
        chunks: tuple[Chunk, ...] | Singles = ()
        for lane in told.batch.lanes:
            chunks = lane.chunks
        for job, tokens, _, _ in chunks:
            if not is_quiet(job.computed, fork.block_size):
                fork.reserve(job, job.computed + tokens)
        return Decodes(fork, chunks, told.evicted, is_short=True)

    def _stuck(self, view: View, busy: set[str]) -> Decodes:
        """Nobody decodes. Where prompts hold all memory and none can go on, somebody leaves."""
        unfinished: Sequence[JobView] = [job for job in view.running if job.todo > 1]
        fork = view.ledger.fork()
        can_go_on = any(fork.need(job, job.computed + 1) <= fork.free for job in unfinished)
        if busy or not unfinished or can_go_on:
            return Decodes(fork)
        return Decodes(fork, evicted=tuple(self._unstick(view, fork)), is_short=True)
