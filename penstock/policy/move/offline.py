"""Offline requests that run where prompts are computed go to replicas that only write answers, and have time left.

Source: xLLM (JD, 2025; report arXiv:2510.14686), online-offline co-location: a latency-strict instance pulls offline
requests from latency-relaxed ones.

Idea: replicas of role "decode" are strict, as their answers are promised a pace, and the others relaxed. Offline
requests (priority above 0) decode anywhere: they stay where their prompt was computed (`keeps_offline`) until a strict
replica has time and memory for one more. Each period a strict replica

    asks       while it uses less than `full` of its memory, its last step took less than `share` of `tpot_s`, and so
               would one with everybody in it who decodes there or is on the way
    prefers    the length at which the batch that saturates the device would just take that long, if all who are
               missing from it were so long (a binary search over the cost model)
    takes      of all offline requests that decode at relaxed replicas the one whose context is nearest to it, among
               those with which the next step keeps the limit and the memory lasts for `ahead_tokens` of everybody

One at a time: whoever has an offline request on its way waits for it, and a relaxed replica gives one a period. Where
offline work is done beside online work is batch "leftover"'s: it preempts it first, and leaves it out of steps that it
would make too long.

Parameters: `tpot_s` (the pace promised to online requests), `share` and `full` (0.9 both), `ahead_tokens` (256, as the
source's admission), `every_s`, `again_s`: a request that was asked for is asked for again after so long, since some
cannot move (several answers, adapters) and reports are late.

Where we differ: the relaxed instance chooses there, by the length it is told; here the policy does, from the last
reports. Memory is looked ahead, as an online request that is handed on waits for room and preempts nobody.

Does not: keep memory beyond `full` for online requests to come (lower it where they come in crowds); send requests
back, or move any but those that decode; know what each online request was promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from msgspec import UNSET, Struct

from penstock.core.types import JobReport, Report, RequestId
from penstock.core.views import PhaseCost
from penstock.policy.loads import saturated, used_blocks
from penstock.policy.move import Decision, Move, View


class _Strict(Struct, gc=False):
    """A replica that could take one. `num`, `tokens`: who decodes there or will, and what they read; `room`: blocks."""

    report: Report
    num: int
    tokens: int
    room: int


@dataclass(slots=True)
class Offline:
    tpot_s: float = 0.05
    share: float = 0.9
    full: float = 0.9
    ahead_tokens: int = 256
    every_s: float = 0.1
    again_s: float = 10.0
    needs_jobs: ClassVar[bool] = True
    needs_cost: ClassVar[bool] = True
    needs_steady: ClassVar[bool] = True
    keeps_offline: ClassVar[bool] = True
    _asked_at: dict[str, float] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not min(self.tpot_s, self.every_s) > 0:
            raise ValueError("tpot_s and every_s must be positive seconds")
        if not (0 < self.share <= 1 and 0 < self.full <= 1):
            raise ValueError("share and full must be above 0 and at most 1")
        if self.ahead_tokens < 0 or not self.again_s >= 0:
            raise ValueError("ahead_tokens and again_s must be at least 0")

    def decide(self, view: View) -> Decision:
        cost = view.cost
        if cost is None:
            return Decision()
        usable = [each for each in view.reports if each.is_alive and each.is_suspect is not True]
        givers = {each.replica: self._given(view, each) for each in usable if _is_relaxed(each)}
        if not any(givers.values()):
            return Decision()
        takers = [self._strict(view, each) for each in usable if _is_strict(each)]
        able = [each for each in takers if each is not None and self._has_time(cost, each)]
        able.sort(key=lambda each: (cost.decode_s(each.num, each.tokens), each.report.replica))
        moves: list[Move] = []
        for taker in able:
            found = self._nearest(cost, taker, givers)
            if found is not None:
                source, job = found
                moves.append(Move(RequestId(job.request), source, taker.report.replica))
                del givers[source]
        if not moves:
            return Decision()
        since = view.now - self.again_s
        self._asked_at = {name: at for name, at in self._asked_at.items() if at > since}
        self._asked_at |= {move.request: view.now for move in moves}
        told = ", ".join([move.target for move in moves])
        return Decision(tuple(moves), f"{told} has time and memory for offline work")

    def _given(self, view: View, report: Report) -> list[JobReport]:
        """Offline jobs that decode there and may leave."""
        return [
            job
            for job in _jobs(report)
            if job.priority > 0
            and job.status == "running"
            and job.computed >= job.num_prompt
            and job.request not in view.moving
            and view.now - self._asked_at.get(job.request, -self.again_s) >= self.again_s
        ]

    def _strict(self, view: View, report: Report) -> _Strict | None:
        """What is there and on its way; None if that is an offline request."""
        coming = [
            job
            for other in view.reports
            if other.replica != report.replica
            for job in _jobs(other)
            if view.moving.get(job.request) == report.replica
        ]
        if any([job.priority > 0 for job in coming]):
            return None
        here = [job for job in _jobs(report) if job.status == "running"]
        used = used_blocks(report)
        if not used < self.full * report.total_blocks:
            return None
        taken = used + sum([job.num_blocks for job in coming])
        growth = sum([self._growth(report, job) for job in (*here, *coming)])
        return _Strict(
            report,
            report.num_decoding + len(coming),
            report.decode_tokens + sum([_length(job) for job in coming]),
            int(self.full * report.total_blocks) - taken - growth,
        )

    def _growth(self, report: Report, job: JobReport) -> int:
        """Blocks that it will take yet, as far as one looks ahead."""
        ahead = min(self.ahead_tokens, max(0, job.max_tokens - job.num_output))
        return max(0, -(-(_length(job) + ahead) // report.block_size) - job.num_blocks)

    def _has_time(self, cost: PhaseCost, taker: _Strict) -> bool:
        limit_s = self.share * self.tpot_s
        last_s = taker.report.step_s if taker.report.num_running else 0.0
        return last_s < limit_s and cost.decode_s(taker.num, taker.tokens) < limit_s

    def _nearest(
        self, cost: PhaseCost, taker: _Strict, givers: dict[str, list[JobReport]]
    ) -> tuple[str, JobReport] | None:
        """The source and the job."""
        missing = max(1, saturated(cost) - taker.num)
        preferred = self._longest(cost, taker, missing)
        most, report = self._longest(cost, taker, 1), taker.report
        able = [
            (source, job)
            for source, jobs in givers.items()
            for job in jobs
            if _length(job) <= most
            and job.num_blocks + self._growth(report, job) <= taker.room
            and source != report.replica
        ]
        return min(
            able,
            key=lambda each: (abs(_length(each[1]) - preferred), each[1].request),
            default=None,
        )

    def _longest(self, cost: PhaseCost, taker: _Strict, more: int) -> int:
        """The length at which so many more just keep the limit; 0 also where none does."""
        low, high = 0, taker.report.total_blocks * taker.report.block_size
        while low < high:
            middle = (low + high + 1) // 2
            step_s = cost.decode_s(taker.num + more, taker.tokens + more * middle)
            if step_s <= self.share * self.tpot_s:
                low = middle
            else:
                high = middle - 1
        return low


def _is_strict(report: Report) -> bool:
    return report.role == "decode" and not report.is_draining


def _is_relaxed(report: Report) -> bool:
    return report.role != "decode"


def _jobs(report: Report) -> Sequence[JobReport]:
    return () if report.jobs is UNSET else report.jobs


def _length(job: JobReport) -> int:
    return job.num_prompt + job.num_output
