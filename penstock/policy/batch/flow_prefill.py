"""Whole prompts, interrupted at an operator when a more urgent one arrives: FlowPrefill.

Source: FlowPrefill (HSIEHCHIACHI/FlowPrefill, commit 1ca0fec), the scheduler of a prefill instance on vLLM 0.11.

Idea: small chunks keep urgent prompts from waiting behind long ones, and cost every prompt the efficiency of large
matrix products. Keep prompts whole, look at what should run only when something arrives or ends, and stop the running
forward at its next operator when it is no longer the most urgent; its work is kept and goes on later.

    slack      = deadline - now - max(0, predict(its chunks) - seconds it ran)          deadline: arrival + slo.ttft_s
    urgency    feasible (slack >= 0) by earliest deadline, then those without a promise, then the hopeless, latest first
    at a look  H = the most urgent of: the running plan, suspended ones, unfinished prompts, the head of the line
               H runs: nothing.  H is another: the running plan is asked to stop
    idle lane  H is suspended: it is resumed.  Otherwise H starts, whole or its first `max_tokens` tokens; with it, if H
               is short (<= batch_tokens) and not in a hurry, others in the order of the line while
                   tokens <= batch_tokens   and   slack(H) - predict(all) >= reserve * slo.ttft_s of H

Parameters
    max_tokens      tokens of one chunk, default 8192: bounds how long one operator takes
    batch_tokens    tokens up to which prompts share a forward, default 2048
    reserve         share of H's TTFT promise that sharing must leave, in [0, 1), default 0.1
    max_suspended   plans suspended at once, default 128; beyond it nothing is interrupted
    max_jobs        jobs running at once, default 256

Where we differ: it was written for an instance that only prefills. Here decodes of the same replica run as a step of
their own between two forwards of prompts, never beside one that may be suspended. The line is ranked by the order
policy (slack-edf gives FlowPrefill's); only its head competes. A head that does not fit in memory lets those who have
started go first. Predictions come from the cost model and not from a polynomial of the prompt's length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from penstock.core.views import Batch, Chunk, Flying, JobView, Lane, LedgerFork, Singles
from penstock.policy.batch import STABLE, Decision, View
from penstock.policy.batch.decodes import all_decodes
from penstock.policy.batch.layered import is_decode
from penstock.policy.batch.vllm_v1 import Draft, decided, make_room

Urgency = tuple[bool, float]


@dataclass(slots=True)
class FlowPrefill:
    max_tokens: int = 8192
    batch_tokens: int = 2048
    reserve: float = 0.1
    max_suspended: int = 128
    max_jobs: int = 256
    interrupts: ClassVar[bool] = True
    _has_decoded: bool = field(init=False, default=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_tokens", "max_jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_suspended < 0 or not 0 <= self.reserve < 1:
            raise ValueError("max_suspended must not be negative, and reserve be in [0, 1)")

    def decide(self, view: View) -> Decision:
        fork = view.ledger.fork()
        if view.flying:
            return self._look(view, fork, view.flying[0])
        decodes = [job for job in view.running if is_decode(job) and not job.in_flight]
        heads = self._heads(view, fork)
        if decodes and not (heads or view.suspended):
            chunks = all_decodes(view.running, fork)
            if chunks and len(chunks) <= view.caps.max_batch_tokens:
                lane = Lane(chunks)
                return Decision(Batch((lane,)), stable_for=STABLE, outlasts=not view.waiting)
        if decodes and not (self._has_decoded and (heads or view.suspended)):
            self._has_decoded = True
            return self._decode(view, decodes)
        self._has_decoded = False
        started = min(view.suspended, key=lambda each: urgency_of_plan(view, each), default=None)
        decision = Decision(why="nothing can start")
        for head in sorted(heads, key=lambda job: self._urgency(view, job)):
            if started is not None and urgency_of_plan(view, started) <= self._urgency(view, head):
                break
            decision = self._start(view, view.ledger.fork(), head)
            if decision.batch.lanes or decision.evicted:
                return decision
        if started is not None:
            return Decision(resume=(started.plan,))
        return self._decode(view, decodes) if decodes else decision

    def _look(self, view: View, fork: LedgerFork, running: Flying) -> Decision:
        """A plan runs: is it still the most urgent?"""
        if running.is_stopping or len(view.suspended) >= self.max_suspended:
            return Decision(why="the lane is busy")
        if not any(is_prompt(chunk) for chunk in running.chunks):
            return Decision(why="decodes are not interrupted")
        mine = urgency_of_plan(view, running)
        others = [urgency_of_plan(view, each) for each in view.suspended]
        others += [self._urgency(view, job) for job in self._heads(view, fork)]
        if min(others, default=mine) < mine:
            return Decision(interrupt=(running.plan,), why="a more urgent prompt waits")
        return Decision(why="the lane is busy")

    def _heads(self, view: View, fork: LedgerFork) -> list[JobView]:
        """Prompts that could start now: unfinished ones, and the head of the line if it fits."""
        heads = [
            job for job in view.running if not job.in_flight and job.todo > 0 and not is_decode(job)
        ]
        if view.waiting and len(view.running) < self._most(view):
            head = view.waiting[0]
            has_started = heads or view.suspended or view.flying
            if not has_started or fork.need(head, head.known) <= fork.free:
                heads.append(head)
        return heads

    def _urgency(self, view: View, job: JobView) -> Urgency:
        return urgency(view.now, job, view.cost.predict((Chunk(job, self._tokens(job)),)))

    def _most(self, view: View) -> int:
        return min(self.max_jobs, view.caps.max_jobs)

    def _tokens(self, job: JobView) -> int:
        return min(job.todo, self.max_tokens)

    def _start(self, view: View, fork: LedgerFork, head: JobView) -> Decision:
        draft = Draft(fork, min(self.max_tokens, view.caps.max_batch_tokens))
        if head.status == "running":
            upto = head.computed + head.in_flight + min(self._tokens(head), draft.budget)
            tokens = upto - head.computed - head.in_flight
            if fork.reserve(head, upto) or make_room(view, draft, head, upto):
                draft.planned[head.seq] = Chunk(head, tokens)
                draft.budget -= tokens
        else:
            self._admit(view, draft, head)
        if head.seq in draft.planned:
            self._share(view, draft, head)
        return decided(draft, tuple(draft.planned.values()))

    def _share(self, view: View, draft: Draft, head: JobView) -> None:
        """Others that H's promise leaves room for."""
        promise = head.request.slo.ttft_s
        first = draft.planned[head.seq]
        slack = deadline_of(head) - view.now - view.cost.predict((first,))
        spare = 0.0 if promise is None else self.reserve * promise
        if first.tokens > self.batch_tokens or slack < spare:
            return
        total = first.tokens
        for job in view.waiting:
            if job.seq in draft.planned:
                continue
            tokens = job.known - draft.fork.cached(job)
            if total + tokens > self.batch_tokens or tokens > draft.budget:
                continue
            chunks = (*draft.planned.values(), Chunk(job, tokens))
            if deadline_of(head) - view.now - view.cost.predict(chunks) < spare:
                return
            if len(view.running) + len(draft.admitted) >= self._most(view):
                return
            if self._admit(view, draft, job):
                total += tokens
            elif draft.is_blocked:
                return

    @staticmethod
    def _admit(view: View, draft: Draft, job: JobView) -> bool:
        fork = draft.fork
        cached = fork.cached(job)
        tokens = min(job.known - cached, draft.budget)
        answer = view.admit(job, tokens, fork)
        if answer != "yes" or not fork.reserve(job, cached + tokens):
            draft.is_blocked = answer != "no"
            return False
        draft.admitted.append(job)
        draft.planned[job.seq] = Chunk(job, tokens)
        draft.budget -= tokens
        return True

    @staticmethod
    def _decode(view: View, decodes: Sequence[JobView]) -> Decision:
        draft = Draft(view.ledger.fork(), view.caps.max_batch_tokens)
        for job in decodes:
            if draft.budget > 0 and job.seq not in draft.gone:
                if draft.fork.reserve(job, job.known) or make_room(view, draft, job, job.known):
                    draft.planned[job.seq] = Chunk(job, 1)
                    draft.budget -= 1
        chunks = tuple(draft.planned.values())
        return Decision(Batch((Lane(chunks),) if chunks else ()), evicted=tuple(draft.evicted))


def is_prompt(chunk: Chunk) -> bool:
    return chunk.tokens > 1 or not chunk.job.num_output


def deadline_of(job: JobView) -> float:
    promise = job.request.slo.ttft_s
    return math.inf if promise is None else job.arrived_at + promise


def urgency(now: float, job: JobView, remaining_s: float) -> Urgency:
    """Smaller is more urgent: (is hopeless, place among those)."""
    deadline = deadline_of(job)
    is_hopeless = deadline - now - max(0.0, remaining_s) < 0
    return is_hopeless, -deadline if is_hopeless else deadline


def urgency_of_plan(view: View, plan: Flying) -> Urgency:
    """Of its first job, for which it was begun."""
    chunks: tuple[Chunk, ...] | Singles = plan.chunks
    left_s = view.cost.predict(chunks) - plan.ran_s
    return urgency(view.now, next(iter(chunks)).job, left_s)
