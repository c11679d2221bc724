"""Offline work in what online work leaves of a step: both kinds on one replica, and only one of them with promises.

Source: xLLM (JD, 2025; report arXiv:2510.14686), online-offline co-location: a step on a latency-strict instance takes
offline decodes while its predicted time is below 0.98 of the promise, and an online arrival ends offline prefill.

Idea: a step may take as long as the online answers in it may wait for a token: `share` of the promised pace, and not
past the instant at which the next token of an answer that kept its pace from the first one would come. Online jobs are
planned as in vllm-v1; what then is left of that time goes to offline jobs, whose priority is above 0 (order "priority"
ranks them last).

    online running    min(todo, budget), in the order of admission; offline jobs are preempted for its blocks first
    online waiting    in order, as admit says; offline jobs are preempted for the whole prompt
    then, unless a prompt of an online job is in the step, and while predicted step <= that time
                      offline decodes, in the order of admission, `each` between two predictions
                      offline prompts, running then waiting, in chunks that just keep to it
    nobody online     the limit is `idle_s`: so long an online arrival may have to wait
    offline starts    keep `reserve` of the blocks free, so that few are preempted when somebody online comes

Parameters: `max_tokens`, `max_jobs`, `tpot_s` (of online requests that promise nothing), `share`, `idle_s`, `reserve`,
`each` (the source re-evaluates every 3 sequences), `is_idle_only`: offline work runs only while nobody is online (the
baseline that the gain is counted over).

Where we differ: the source's strict instances compute no prompts and take 0.98. Here prompts come between, which the
tenth that is left over pays for, and whoever is behind is waited for. An arrival ends offline prefill at the end of a
step, which is never longer than idle_s; the source stops inside it. Who is preempted keeps his place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.views import Batch, Chunk, JobView, Lane
from penstock.policy.batch import STABLE, Decision, View
from penstock.policy.batch.vllm_v1 import Draft, columns_first, drop, give_way

LEAST = 16  # tokens of an offline chunk: fewer are not worth the constant of a step


def is_offline(job: JobView) -> bool:
    return job.priority > 0


@dataclass(slots=True)
class Leftover:
    max_tokens: int = 2048
    max_jobs: int = 256
    tpot_s: float = 0.05
    share: float = 0.9
    idle_s: float = 0.1
    reserve: float = 0.05
    each: int = 3
    is_idle_only: bool = False

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.max_jobs, self.each) < 1:
            raise ValueError("max_tokens, max_jobs and each must be at least 1")
        if not min(self.tpot_s, self.idle_s) > 0:
            raise ValueError("tpot_s and idle_s must be positive seconds")
        if not 0 < self.share <= 1 or not 0 <= self.reserve < 1:
            raise ValueError("share must be above 0 and at most 1, reserve from 0 up and below 1")

    def decide(self, view: View) -> Decision:
        if view.busy_lanes:
            return Decision(why="the lane is busy")
        draft = Draft(view.ledger.fork(), min(self.max_tokens, view.caps.max_batch_tokens))
        online = [job for job in view.running if not is_offline(job)]
        waiting = [job for job in view.waiting if not is_offline(job)]
        self._run_online(view, draft, online)
        held = self._start_online(view, draft, waiting) if not _is_short(draft) else True
        has_online = bool(online or draft.admitted or (waiting and not held))
        has_prompt = any(chunk.tokens > 1 for chunk in draft.planned.values())
        if not has_prompt and not (self.is_idle_only and (online or draft.admitted)):
            self._add_offline(view, draft, self._limit_s(view, online, has_online=has_online))
        chunks = columns_first(draft)
        is_plain = len(online) == len(view.running) == len(draft.planned) and not view.waiting
        return Decision(
            Batch((Lane(chunks),) if chunks else ()),
            tuple(draft.admitted),
            tuple(draft.evicted),
            stable_for=STABLE if is_plain and not has_prompt and not draft.evicted else 1,
        )

    def _limit_s(self, view: View, online: Sequence[JobView], *, has_online: bool) -> float:
        """Of the step, if offline jobs are to be in it."""
        if not has_online:
            return self.idle_s
        limit_s = math.inf
        for job in online:
            pace_s = job.request.slo.tpot_s or self.tpot_s
            limit_s = min(limit_s, self.share * pace_s)
            if job.first_token_at is not None:
                limit_s = min(limit_s, job.first_token_at + pace_s * job.num_output - view.now)
        return limit_s if online else self.share * self.tpot_s

    def _run_online(self, view: View, draft: Draft, online: Sequence[JobView]) -> None:
        for job in online:
            tokens = min(job.todo, draft.budget)
            if tokens < 1 or job.seq in draft.gone:
                continue
            upto = job.computed + job.in_flight + tokens
            if _make_room(view, draft, job, upto):
                draft.planned[job.seq] = Chunk(job, tokens)
                draft.budget -= tokens

    def _start_online(self, view: View, draft: Draft, waiting: Sequence[JobView]) -> bool:
        """Whether the head of the line waits."""
        for job in waiting:
            if not draft.budget or self._slots(view, draft) < 1:
                return True
            fork = draft.fork
            self._clear(view, draft, job)
            tokens = min(job.known - fork.cached(job), draft.budget)
            answer = view.admit(job, tokens, fork)
            if answer == "no":
                continue
            if answer == "later" or not fork.reserve(job, fork.cached(job) + tokens):
                return True
            draft.planned[job.seq] = Chunk(job, tokens)
            draft.admitted.append(job)
            draft.budget -= tokens
        return False

    def _clear(self, view: View, draft: Draft, job: JobView) -> None:
        """Preempt offline jobs until a whole online prompt fits, or none is left."""
        fork = draft.fork
        while fork.need(job, job.known) > fork.free:
            among = [
                other
                for other in view.running
                if is_offline(other) and other.seq not in draft.gone and not other.in_flight
            ]
            missing = fork.need(job, job.known) - fork.free
            victims = view.victims(job, missing, [job, *among], fork) if among else ()
            if not victims or any(eviction.item is job for eviction in victims):
                return
            for eviction in victims:
                drop(draft, eviction)

    def _add_offline(self, view: View, draft: Draft, limit_s: float) -> None:
        offline = [job for job in view.running if is_offline(job) and job.seq not in draft.gone]
        decodes = [job for job in offline if job.todo == 1]
        for start in range(0, len(decodes), self.each):
            few = decodes[start : start + self.each][: draft.budget]
            planned = [*draft.planned.values(), *(Chunk(job, 1) for job in few)]
            if not few:
                return
            if view.cost.predict(planned) > limit_s:
                if draft.planned:
                    return
                few = few[:1]  # somebody goes on, whatever it takes
            for job in few:
                upto = job.computed + job.in_flight + 1
                if job.seq not in draft.gone and _make_room(view, draft, job, upto):
                    draft.planned[job.seq] = Chunk(job, 1)
                    draft.budget -= 1
        for job in offline:
            if job.todo > 1 and job.seq not in draft.gone:
                start = job.computed + job.in_flight
                tokens = self._fitting(view, draft, job, job.todo, limit_s)
                if tokens < 1 or not _make_room(view, draft, job, start + tokens):
                    return
                draft.planned[job.seq] = Chunk(job, tokens)
                draft.budget -= tokens
        if not _is_short(draft):
            self._start_offline(view, draft, limit_s)

    def _start_offline(self, view: View, draft: Draft, limit_s: float) -> None:
        kept = math.ceil(self.reserve * draft.fork.total)
        for job in view.waiting:
            if not is_offline(job):
                continue
            if draft.budget < 1 or self._slots(view, draft) < 1:
                return
            fork = draft.fork
            cached = fork.cached(job)
            if fork.need(job, job.known) + kept > fork.free and len(view.running):
                return
            tokens = self._fitting(view, draft, job, job.known - cached, limit_s)
            if tokens < 1:
                return
            answer = view.admit(job, tokens, fork)
            if answer == "no":
                continue
            if answer == "later" or not fork.reserve(job, cached + tokens):
                return
            draft.planned[job.seq] = Chunk(job, tokens)
            draft.admitted.append(job)
            draft.budget -= tokens

    def _fitting(self, view: View, draft: Draft, job: JobView, todo: int, limit_s: float) -> int:
        """The most tokens of a prompt that keep the step within its limit; 0 for fewer than are worth it."""
        planned, most = [*draft.planned.values()], min(todo, draft.budget)
        low, high = 0 if planned else min(LEAST, most), most
        if most < 1:
            return 0
        if view.cost.predict([*planned, Chunk(job, most)]) <= limit_s:
            return most
        while high - low > LEAST:
            middle = (low + high) // 2
            if view.cost.predict([*planned, Chunk(job, middle)]) <= limit_s:
                low = middle
            else:
                high = middle
        return low if low >= LEAST or not planned else 0

    def _slots(self, view: View, draft: Draft) -> int:
        most = min(self.max_jobs, view.caps.max_jobs)
        return most - len(view.running) - len(draft.admitted)


def _make_room(view: View, draft: Draft, job: JobView, upto: int) -> bool:
    """Preempt until `job` holds [0, upto): offline jobs first, and for an offline job nobody else."""
    fork = draft.fork
    while not fork.reserve(job, upto):
        able = [each for each in view.running if each.seq not in draft.gone and not each.in_flight]
        among = [each for each in able if is_offline(each)]
        if not among and not is_offline(job):
            among = able
        missing = fork.need(job, upto) - fork.free
        victims = view.victims(job, missing, among, fork) if among else ()
        if not victims or not give_way(draft, victims, job, upto):
            return False
    return True


def _is_short(draft: Draft) -> bool:
    """Somebody was preempted: nobody starts in this step."""
    return bool(draft.gone)
