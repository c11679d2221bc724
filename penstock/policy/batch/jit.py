"""Each job just the service that it needs to be in time: JITServe's batches.

Source: JITServe (UIUC-MLSys/JITServe, a fork of vLLM); the rule by reserved bandwidth is a reconstruction that works
where the released density degrades to "shorter first".

Idea: a stream that is promised a token every 100 ms needs every fourth step of 25 ms, an answer due in 20 s that takes
10 s needs every second one. So more jobs are in memory than a step serves, and each step chooses whom it serves. Who
is not chosen pauses and keeps its memory.

    1  needs and worth of all running jobs and of the first `candidates` that wait, in the order policy's order; see
       penstock.policy.bandwidth
    2  bandwidth is reserved, dearest first, until it sums to max_sequences. Dear is worth / usual work left, or with
       rank_by = "bandwidth" worth / bandwidth. Nothing is reserved for what cannot be in time
    3  those with a reservation go first, least time to spare first; then the others, dearest first
    4  the first max_sequences are served: one token each, and prompts share what is left of max_tokens
    5  a running job that finds no memory takes it from those behind it; one that waits only from jobs without a
       reservation whose score is below its own over `margin`, at most `max_swaps` a step: what they had computed is
       lost, so a little more worth does not pay

Parameters
    max_tokens      tokens of one step, default 512; never above the executor's own limit
    max_sequences   jobs served in one step, default 256
    max_jobs        jobs in memory, default 1024; never above the executor's own limit
    candidates      waiting jobs looked at, default 64
    rank_by         "work" (default) or "bandwidth"
    margin          default 2
    max_swaps       default 4; 0 = nobody is evicted for one that waits
    quantile        of the length that bandwidth is reserved for, in (0, 1), default 0.95
    usual           of the length that worth and chances are judged by, default 0.5
    renew_tokens    tokens of an answer after which its length is asked for again, default 50

Where we differ: the source forms batches anew every 50 steps and swaps jobs that are left out to host memory; here
every step chooses, since pausing costs nothing while memory lasts, and a job that must leave is computed again. Its
grouping by length is order jit-density's. Who leaves for a running job is the evict policy's answer; candidates are
offered in the order of service, so that recompute-last takes the one worth least.

What a call takes: about a millisecond for 256 running jobs and the candidates, every step, and some 10 us for each job
that starts: above 1 ms in steps in which dozens do (benchmarks/decide.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from penstock.core.events import Event
from penstock.core.views import Batch, Chunk, Eviction, JobView, Lane, LedgerFork, Singles
from penstock.policy.bandwidth import Docket, Floats, Progress, reserve
from penstock.policy.batch import STABLE, Decision, View
from penstock.policy.batch.decodes import all_decodes


@dataclass(slots=True)
class Step:
    """One step in the making, with places and tokens left of it. `ranked`: in the order of service.

    `is_quiet`: runs, and decodes one token that no fork need hear of.
    """

    fork: LedgerFork
    ranked: list[JobView]
    scores: list[float]
    is_reserved: list[bool]
    is_quiet: list[bool]
    places_left: int
    tokens_left: int
    slots_left: int  # in memory
    swaps_left: int
    singles: list[JobView] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[JobView] = field(default_factory=list)
    evicted: list[Eviction[JobView]] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)
    is_blocked: bool = False

    def drop(self, eviction: Eviction[JobView]) -> None:
        self.fork.release(eviction.item)
        self.gone.add(eviction.item.seq)
        self.evicted.append(eviction)
        self.slots_left += 1

    def behind(self, place: int) -> list[JobView]:
        """Running jobs that are ranked behind a place and have not left, dearest first."""
        found = self.ranked[place + 1 :]
        return [job for job in found if job.status == "running" and job.seq not in self.gone]


@dataclass(slots=True)
class Jit:
    max_tokens: int = 512
    max_sequences: int = 256
    max_jobs: int = 1024
    candidates: int = 64
    rank_by: Literal["work", "bandwidth"] = "work"
    margin: float = 2.0
    max_swaps: int = 4
    quantile: float = 0.95
    usual: float = 0.5
    renew_tokens: int = 50
    _docket: Docket = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_sequences", "max_jobs", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.margin < 1 or self.max_swaps < 0:
            raise ValueError("margin must be at least 1, and max_swaps not negative")
        self._docket = Docket(self.quantile, self.usual, self.renew_tokens, self.max_tokens)

    def observe(self, event: Event) -> None:
        self._docket.observe(event)

    def decide(self, view: View) -> Decision:
        if view.busy_lanes:
            return Decision(why="the lane is busy")
        running, caps = view.running, view.caps
        tokens = min(self.max_tokens, caps.max_batch_tokens)
        places = min(self.max_sequences, tokens)
        slots = min(self.max_jobs, caps.max_jobs) - len(running)
        if len(running) <= places and not (view.waiting and slots > 0):
            decodes = all_decodes(running, view.ledger.fork())
            if decodes:
                batch = Batch((Lane(decodes),))
                return Decision(batch, stable_for=STABLE, outlasts=not view.waiting)
        jobs = [*running, *view.waiting[: self.candidates if slots > 0 else 0]]
        if not jobs:
            return Decision()
        step = self._ranked(view, jobs)
        step.places_left, step.tokens_left, step.slots_left = places, tokens, slots
        self._walk(view, step)
        return self._told(step)

    def _ranked(self, view: View, jobs: list[JobView]) -> Step:
        progress = Progress.of(jobs)
        needs = self._docket.needs(view, jobs, progress)
        is_by_bandwidth = self.rank_by == "bandwidth"
        is_reserved, score = reserve(needs, self.max_sequences, is_by_bandwidth)
        key: Floats = np.where(is_reserved, needs.latest_at, -score)
        ranks = np.lexsort((key, ~is_reserved))
        fork = view.ledger.fork()
        is_decode = (progress.todo == 1) & (progress.num_output > 0)
        is_decode[len(view.running) :] = False
        starts = np.array([job.computed + job.in_flight for job in jobs], dtype=np.intp)
        within = starts % fork.block_size
        is_quiet = is_decode & (within > 0) & (within < fork.block_size - 1)
        return Step(
            fork,
            [jobs[i] for i in ranks.tolist()],
            score[ranks].tolist(),
            is_reserved[ranks].tolist(),
            is_quiet[ranks].tolist(),
            0,
            0,
            0,
            self.max_swaps,
        )

    def _walk(self, view: View, step: Step) -> None:
        """Serve from the front until places or tokens run out."""
        room = step.tokens_left - step.places_left  # for prompts beside the decodes
        for place, job in enumerate(step.ranked):
            if step.places_left < 1 or step.tokens_left < 1:
                return
            if step.gone and job.seq in step.gone:
                continue
            if step.is_quiet[place]:
                step.singles.append(job)
                step.places_left -= 1
                step.tokens_left -= 1
                continue
            is_running = job.status == "running"
            if not is_running and (step.is_blocked or step.slots_left < 1):
                continue  # who waits must wait on
            todo = job.todo if is_running else job.known - step.fork.cached(job)
            tokens = 1 if todo == 1 else min(todo, room + 1, step.tokens_left)
            if todo > 1 and room < 0:
                continue
            if is_running:
                is_served = self._go_on(view, step, place, tokens)
            else:
                is_served = self._start(view, step, place, tokens, job.known - todo)
            if is_served:
                room -= tokens - 1
                step.places_left -= 1
                step.tokens_left -= tokens

    def _go_on(self, view: View, step: Step, place: int, tokens: int) -> bool:
        job, fork = step.ranked[place], step.fork
        start = job.computed + job.in_flight
        upto = start + tokens
        while not fork.reserve(job, upto):
            among = step.behind(place)
            victims = among and view.victims(job, fork.need(job, upto) - fork.free, among, fork)
            if not victims:
                step.is_blocked = True
                return False
            for eviction in victims:
                step.drop(eviction)
        if upto == job.known and tokens == 1 and (job.num_output or job.request.kind == "generate"):
            step.singles.append(job)
        else:
            step.chunks.append(Chunk(job, tokens))
        return True

    def _start(self, view: View, step: Step, place: int, tokens: int, cached: int) -> bool:
        """Admit a job that waits. When it must wait on, so must all behind it that wait."""
        job, fork = step.ranked[place], step.fork
        need = fork.need(job, job.known) - fork.free
        if need > 0 and step.swaps_left:
            self._oust(step, place, need)
            cached = fork.cached(job)  # who left may have been about to fill what was found
        answer = view.admit(job, tokens, fork)
        if answer == "no":
            return False
        if answer == "later" or not fork.reserve(job, cached + tokens):
            step.is_blocked = True
            return False
        step.admitted.append(job)
        step.chunks.append(Chunk(job, tokens))
        step.slots_left -= 1
        return True

    def _oust(self, step: Step, place: int, need: int) -> None:
        """Make room for a job that waits, if few jobs without a reservation that are worth much less suffice."""
        if not step.is_reserved[place]:
            return
        bar, fork = step.scores[place] / self.margin, step.fork
        leaving: list[JobView] = []
        for at in range(len(step.ranked) - 1, place, -1):
            if step.is_reserved[at] or len(leaving) >= step.swaps_left:
                return
            job = step.ranked[at]
            if step.scores[at] < bar and job.status == "running" and job.seq not in step.gone:
                leaving.append(job)
                need -= fork.freeable(job)
                if need <= 0:
                    break
        if need > 0:
            return
        for job in leaving:
            step.drop(Eviction(job))
            step.swaps_left -= 1

    @staticmethod
    def _told(step: Step) -> Decision:
        chunks: tuple[Chunk, ...] | Singles = tuple(step.chunks)
        if step.singles:
            chunks = Singles(tuple(step.singles), tuple(step.chunks))
        return Decision(
            Batch((Lane(chunks),) if chunks else ()),
            tuple(step.admitted),
            tuple(step.evicted),
            "waits for memory" if step.is_blocked else "",
        )
