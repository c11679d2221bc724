"""Running requests leave replicas whose memory is about to end for those that have the most of it.

Source: Llumnix (Sun et al., OSDI 2024), sections 4.3 and 4.4: virtual usage and freeness, pairing of sources and
targets, the choice of the request. The figures are the defaults of AlibabaPAI/llumnix (v1): period, threshold, pairing
"defrag", choice "SR" (shortest running).

Idea: freeness is how many steps a replica's batch can go on before its memory ends, counted in blocks a running job:

    (total - sum of virtual usages) / jobs

What runs counts with what it holds and what the rest of its prompt will take, what waits at the head of a queue with
what it asks for: so a replica whose head-of-line request does not fit looks full, others send nothing there and it
sends away (defragmentation). While urgent jobs run, all but `urgent_blocks` of a replica's memory counts as used, which
keeps others off (priorities). A replica that drains has no freeness at all: everything leaves it (scaling in). Each
period replicas below `low`, and those where somebody was preempted and waits, are paired with those above `high` where
nobody waits, the fullest with the freest, and each source gives the request that costs least: the least urgent, then
the shortest.

Parameters: `low`, `high` (blocks a job: sources and targets), `urgent_blocks` that a replica with urgent jobs is to
hold at most (None: no headroom for them; the paper's is 1,600 tokens), `every_s` (period), `last_blocks`: requests of
up to so many blocks are copied while they stand still, as their pause is one last stage anyway.

Where we differ: v1 picks the request inside the replica, at the moment of moving; here the policy picks it from the
last report, and a request that has ended meanwhile simply does not move. The rest of prompts is counted because prompts
are computed in chunks here, and take memory as they go; there they take all of it at once. Pairing is that of v1's
default; its "balanced" variant is `balanced = true`.

Does not: dispatch (route "llumnix") or scale (scale "llumnix"); move what waits (they would gain nothing here that a
better dispatch would not).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import ClassVar

from msgspec import UNSET

from penstock.core.types import JobReport, Report, RequestId
from penstock.policy.loads import neg_freeness, rest_blocks
from penstock.policy.move import Cause, Decision, Move, MoveMode, View

FORGOTTEN_S = 1.0  # since a request was asked to move; reports come every 0.1 s


@dataclass(slots=True)
class Llumnix:
    low: float = 3.0
    high: float = 3.0
    urgent_blocks: int | None = 100
    every_s: float = 0.05
    last_blocks: int = 16
    balanced: bool = False
    _asked_at: dict[str, float] = field(default_factory=dict, init=False)  # by request
    needs_jobs: ClassVar[bool] = True
    needs_steady: ClassVar[bool] = True
    causes: ClassVar[tuple[Cause, ...]] = ("draining",)

    def __post_init__(self) -> None:
        if not self.every_s > 0:
            raise ValueError(f"every_s must be a positive number of seconds, got {self.every_s}")
        if self.high < self.low:
            raise ValueError(f"high must be at least low ({self.low}), got {self.high}")
        if self.last_blocks < 0 or (self.urgent_blocks or 0) < 0:
            raise ValueError("urgent_blocks and last_blocks must be at least 0")

    def decide(self, view: View) -> Decision:
        free = {
            report.replica: -neg_freeness(report, self.urgent_blocks)
            for report in view.reports
            if report.is_alive
        }
        by_name = {report.replica: report for report in view.reports}
        order = sorted(free, key=lambda name: (free[name], name))
        sources = [
            name
            for name in order
            if by_name[name].num_running and (free[name] < self.low or _is_short(by_name[name]))
        ]
        targets = [
            name
            for name in reversed(order)
            if free[name] > self.high
            and not (by_name[name].is_draining or by_name[name].num_waiting)
        ]
        moves: list[Move] = []
        for source, target in zip(sources, targets, strict=False):
            if source == target:
                break
            found = self._pick(view, by_name[source], by_name[target])
            if found is not None and self._pays(free, by_name, source, target, found):
                mode: MoveMode = "blocking" if found.num_blocks <= self.last_blocks else "live"
                moves.append(Move(RequestId(found.request), source, target, mode))
        if not moves:
            return Decision()
        self._remember(view.now, moves)
        told = ", ".join(f"{move.source} {free[move.source]:.1f}" for move in moves)
        return Decision(tuple(moves), f"freeness of {told} is below {self.low:g}")

    def _remember(self, now: float, moves: Sequence[Move]) -> None:
        asked = {request: at for request, at in self._asked_at.items() if at > now - FORGOTTEN_S}
        self._asked_at = asked | {move.request: now for move in moves}

    def _may_have_left(self, now: float, job: JobReport, source: Report) -> bool:
        """Whoever was asked to move stays in the reports of its old replica until one that is made when it has left.

        Reports are of their replica's clock, which on another host may be far behind: so for a while only.
        """
        asked_at = self._asked_at.get(job.request, -inf)
        if now >= asked_at + 2 * FORGOTTEN_S:
            return False
        is_leaving = source.moving_out > 0 and source.at < asked_at + FORGOTTEN_S
        return source.at <= asked_at or is_leaving

    def _pick(self, view: View, source: Report, target: Report) -> JobReport | None:
        """The least urgent and then the shortest that decodes, is not moving and fits."""
        jobs: Sequence[JobReport] = () if source.jobs is UNSET else source.jobs
        room = target.free_blocks - rest_blocks(target)
        able = [
            job
            for job in jobs
            if job.status == "running"
            and job.computed >= job.num_prompt
            and job.request not in view.moving
            and not self._may_have_left(view.now, job, source)
            and job.num_blocks < room
        ]
        return min(able, key=lambda job: (-job.priority, job.num_blocks, job.request), default=None)

    def _pays(
        self,
        free: dict[str, float],
        by_name: dict[str, Report],
        source: str,
        target: str,
        job: JobReport,
    ) -> bool:
        """With `balanced`: whether the two are nearer to each other afterwards, and in the same order or level."""
        giver, taker = by_name[source], by_name[target]
        if not self.balanced or giver.is_draining:
            return True
        before = free[target] - free[source]
        jobs = (max(1, giver.num_running - 1), taker.num_running + 1)
        left = free[source] * max(1, giver.num_running) + job.num_blocks
        right = free[target] * max(1, taker.num_running) - job.num_blocks
        after = right / jobs[1] - left / jobs[0]
        return 0 <= after < before


def _is_short(report: Report) -> bool:
    """Whether somebody was preempted there, and waits."""
    jobs: Sequence[JobReport] = () if report.jobs is UNSET else report.jobs
    return any(job.status == "waiting" and job.num_output > 0 for job in jobs)
