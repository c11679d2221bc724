"""One token budget for everything: vLLM v1.

Source: vLLM v1 `Scheduler.schedule` (vllm 0.33, v1/core/sched/scheduler.py).

Idea: there is no prefill and no decode phase; every job must make what is computed catch up with what is known.
Running jobs take from the budget first, in the order of admission, and make room by preemption when memory is
short; waiting jobs take what is left, head of the line first, and only in steps in which nobody was preempted.

    for a running job   n = min(todo, long_prefill_tokens, budget left); n = 0 is passed over, the walk goes on
    for a waiting job   n = min(known - cached, long_prefill_tokens, budget left)
    a victim already planned returns its tokens to the budget
    "later" from admit stops the walk (nobody overtakes the head); "no" passes over the job, which will be refused

Parameters
    max_tokens          tokens of one step, default 2048; never above the executor's own limit
    max_jobs            jobs running at once, default 256; never above the executor's own limit
    long_prefill_tokens longest chunk of one job while other jobs exist, default None (no such limit)
    is_chunked          prompts may be computed in pieces, default True; if not, the walk stops at a job whose tokens
                        exceed the budget left, so max_tokens must then be at least the longest context
    stops_on_self       a job that preempts itself ends the walk over the running (vLLM's FCFS), default True; False
                        goes on with the next (vLLM's priority mode: with order priority, evict recompute-priority)
    is_ahead            admissions lag one step, default False: vLLM with asynchronous scheduling (its default since
                        0.14) plans a step while the one before still runs, so a job that arrived, or a slot that
                        came free, since the last decision serves only the next. An idle engine admits at once

Where we differ: victims, admission and ranking are answers of other policies (recompute-last, full-fit and fcfs give
vLLM's own). No drafts, encoder budgets, grammars or KV that other replicas hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.core.views import Batch, Chunk, Eviction, JobView, Lane, LedgerFork, Singles
from penstock.policy.batch import STABLE, Decision, View
from penstock.policy.batch.decodes import all_decodes


@dataclass(slots=True)
class Draft:
    """What one call has planned so far. `decodes`: the running jobs, when each wants one token and all fit.

    `gone` names the jobs preempted in this call.
    """

    fork: LedgerFork
    budget: int
    decodes: Singles | None = None
    planned: dict[int, Chunk] = field(default_factory=dict)
    admitted: list[JobView] = field(default_factory=list)
    evicted: list[Eviction[JobView]] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)
    is_blocked: bool = False  # the head of the line waits for memory
    is_held: bool = False  # it waits, for whatever reason the admit policy has


@dataclass(slots=True)
class VllmV1:
    max_tokens: int = 2048
    max_jobs: int = 256
    long_prefill_tokens: int | None = None
    is_chunked: bool = True
    stops_on_self: bool = True
    is_ahead: bool = False
    _last_at: float = field(init=False, default=0.0, repr=False)  # when it last decided
    _slots: int = field(init=False, default=0, repr=False)  # taken after that

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_jobs", "long_prefill_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def decide(self, view: View) -> Decision:
        if view.busy_lanes:
            return Decision(why="the lane is busy")
        running, caps = view.running, view.caps
        budget = min(self.max_tokens, caps.max_batch_tokens)
        max_jobs = min(self.max_jobs, caps.max_jobs)
        taken = self._taken(view) if self.is_ahead else len(running)
        may_admit = len(view.waiting) > 0 and taken < max_jobs
        fork = view.ledger.fork()
        decodes: Singles | None = None
        # The latest is the one that most likely is no decode: then nothing is booked in vain.
        may_decode = len(running) <= budget and not (running and todo_of(running[-1]) > 1)
        if may_decode:
            decodes = all_decodes(running, fork)
        has_decodes = decodes is not None and len(running) > 0
        if decodes is not None and has_decodes and not (may_admit or self.is_ahead):
            return Decision(Batch((Lane(decodes),)), stable_for=STABLE, outlasts=not view.waiting)
        if decodes is not None:
            draft = Draft(fork, budget - len(running), decodes)
        else:
            draft = Draft(view.ledger.fork() if may_decode else fork, budget)
            self._walk_running(view, draft)
        if may_admit and not draft.gone:
            self._walk_waiting(view, draft, max_jobs - taken)
        if draft.decodes is not None and has_decodes:
            chunks: tuple[Chunk, ...] | Singles
            chunks = Singles(draft.decodes.jobs, tuple(draft.planned.values()))
        else:
            chunks = columns_first(draft)
        is_stable = has_decodes and not draft.admitted and (draft.is_held or not may_admit)
        if self.is_ahead and not self._is_settled(view, draft, taken, max_jobs):
            is_stable = False
        return Decision(
            Batch((Lane(chunks),) if chunks else ()),
            tuple(draft.admitted),
            tuple(draft.evicted),
            "waits for memory" if draft.is_blocked else "",
            STABLE if is_stable else 1,
            not self.is_ahead and len(running) + len(draft.admitted) <= budget,
        )

    def _taken(self, view: View) -> int:
        """Slots taken, as far as the decision before this one could know."""
        return max(len(view.running), self._slots) if view.running else 0

    def _is_late(self, view: View, job: JobView) -> bool:
        """Whether the decision before this one, made while a step ran, could not know the job."""
        return len(view.running) > 0 and job.arrived_at > self._last_at

    def _is_settled(self, view: View, draft: Draft, taken: int, max_jobs: int) -> bool:
        """Remember this decision; whether the next one, without any news, would be the same."""
        may_come = taken < max_jobs or taken > len(view.running)
        is_settled = not may_come or not any(self._is_late(view, job) for job in view.waiting)
        is_settled = is_settled and (not view.waiting or taken == len(view.running))
        self._last_at = view.now
        self._slots = len(view.running) + len(draft.admitted) - len(draft.evicted)
        return is_settled

    def _limit(self, view: View, tokens: int) -> int:
        longest = self.long_prefill_tokens
        if longest is None or tokens <= longest or len(view.running) + len(view.waiting) < 2:
            return tokens
        return longest

    def _walk_running(self, view: View, draft: Draft) -> None:
        gone, planned, reserve = draft.gone, draft.planned, draft.fork.reserve
        last = draft.fork.block_size - 1
        for job in view.running:
            if draft.budget < 1:
                return
            if job.seq in gone:
                continue
            start = job.computed + job.in_flight
            todo = job.num_prompt + job.num_output - start
            tokens = 1 if todo == 1 else min(self._limit(view, todo), draft.budget)
            if tokens < 1:
                continue
            upto = start + tokens
            # As in decodes.all_decodes: of single positions the fork hears of those that begin or fill a block.
            is_quiet = tokens == 1 and 0 < start % (last + 1) < last
            if is_quiet or reserve(job, upto) or make_room(view, draft, job, upto):
                planned[job.seq] = Chunk(job, tokens)
                draft.budget -= tokens
            elif self.stops_on_self:
                return

    def _walk_waiting(self, view: View, draft: Draft, slots: int) -> None:
        fork, is_refused = draft.fork, False
        for job in view.waiting:
            if draft.budget < 1 or len(draft.admitted) >= slots:
                return
            if self.is_ahead and self._is_late(view, job):
                continue
            cached = fork.cached(job)
            tokens = self._limit(view, job.known - cached)
            if tokens > draft.budget:
                if not self.is_chunked:
                    return
                tokens = draft.budget
            answer = view.admit(job, tokens, fork)
            if answer == "no":
                is_refused = True
                continue
            if answer == "later":
                draft.is_held = not is_refused
                draft.is_blocked = draft.is_held and fork.need(job, job.known) > fork.free
                return
            if not fork.reserve(job, cached + tokens):
                return
            draft.planned[job.seq] = Chunk(job, tokens)
            draft.admitted.append(job)
            draft.budget -= tokens


def todo_of(job: JobView) -> int:
    return job.num_prompt + job.num_output - job.computed - job.in_flight


def columns_first(draft: Draft) -> tuple[Chunk, ...] | Singles:
    """Decodes by columns if they come first, which they nearly always do."""
    chunks = tuple(draft.planned.values())
    admitted = {job.seq for job in draft.admitted}
    num = 0
    for chunk in chunks:
        job = chunk.job
        if chunk.tokens > 1 or todo_of(job) != 1 or job.seq in admitted:
            break
        if not (job.num_output or job.request.kind == "generate"):
            break
        num += 1
    if not num:
        return chunks
    return Singles(tuple([chunk.job for chunk in chunks[:num]]), chunks[num:])


def make_room(view: View, draft: Draft, job: JobView, upto: int) -> bool:
    """Preempt until `job` holds [0, upto). False when it gave up itself or nobody could leave."""
    fork = draft.fork
    while not fork.reserve(job, upto):
        among = [
            other for other in view.running if other.seq not in draft.gone and not other.in_flight
        ]
        victims = view.victims(job, fork.need(job, upto) - fork.free, among, fork)
        if not victims or not give_way(draft, victims, job, upto):
            return False
    return True


def give_way(draft: Draft, victims: Sequence[Eviction[JobView]], job: JobView, upto: int) -> bool:
    """They leave, one after the other until `job` fits. False when it is one of them itself."""
    for eviction in victims:
        drop(draft, eviction)
        if eviction.item.seq == job.seq:
            return False
        if draft.fork.need(job, upto) <= draft.fork.free:
            break
    return True


def decided(draft: Draft, chunks: tuple[Chunk, ...] | Singles) -> Decision:
    """One lane with these chunks, and what else the draft says."""
    return Decision(
        Batch((Lane(chunks),) if chunks else ()),
        tuple(draft.admitted),
        tuple(draft.evicted),
        "waits for memory" if draft.is_blocked else "",
    )


def drop(draft: Draft, eviction: Eviction[JobView]) -> None:
    seq = eviction.item.seq
    draft.fork.release(eviction.item)
    draft.gone.add(seq)
    draft.evicted.append(eviction)
    planned = draft.planned.pop(seq, None)
    if planned is not None:
        draft.budget += planned.tokens
