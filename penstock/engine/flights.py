"""The plans of one replica that were launched and have not ended, and those that stopped inside their forward.

A batch policy may interrupt a running plan at its executor's finest boundary. Once the executor says Yielded, the plan
is suspended: its lane is idle, its jobs keep their blocks and stay in flight, and it goes on when the policy resumes
it. When the last of its jobs is cancelled it is aborted. A plan that somebody else stopped goes on at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from penstock.core.events import Suspended
from penstock.core.plans import Plan, Yielded
from penstock.core.ports import RepeatingExecutor
from penstock.core.records import Record
from penstock.core.types import Job, PlanId
from penstock.core.views import Chunk, Flying, Singles
from penstock.engine.parts import Parts


class Flight(Record):
    """A launched plan, and the live jobs behind its plain numbers."""

    plan: Plan
    jobs: Sequence[Job]
    repeat: int
    launched_at: float
    chunks: tuple[Chunk, ...] | Singles
    paused_s: float = 0.0
    paused_at: float | None = None
    activation_bytes: int = 0
    is_stopping: bool = False

    def seen(self, now: float) -> Flying:
        """As policies see it."""
        until = now if self.paused_at is None else self.paused_at
        ran_s = until - self.launched_at - self.paused_s
        plan = self.plan
        return Flying(
            plan.id, plan.lane, self.chunks, ran_s, self.activation_bytes, self.is_stopping
        )


class Flights:
    """`interrupts`: the batch policy stops plans, and resumes them."""

    def __init__(self, parts: Parts, interrupts: bool) -> None:
        self._parts, self._executor = parts, parts.executor
        self._interrupts = interrupts
        self.running: dict[PlanId, Flight] = {}
        self.suspended: dict[PlanId, Flight] = {}

    def hurry(self) -> None:
        """Something came in: plans that repeat a step end with the one that runs.

        Where another lane may plan meanwhile they take their blocks now, as they would have step by step.
        """
        for plan, flight in self.running.items():
            if flight.repeat > 1:
                steps = self._executor.interrupt(plan, "step")
                if steps is not None and self._executor.caps.max_lanes > 1:
                    self._parts.ledger.extend_each(flight.jobs, steps)

    def take_blocks(self) -> None:
        """Plans that repeat a step end with the one that runs, and take its blocks now: somebody else wants some."""
        for plan, flight in self.running.items():
            if flight.repeat > 1:
                steps = self._executor.interrupt(plan, "step")
                if steps is not None:
                    self._parts.ledger.extend_each(flight.jobs, steps)

    def written(self, table: Sequence[int]) -> int:
        """The first so many of these blocks that no plan under way is writing: of a prompt that others share, blocks
        have names before they are written."""
        size, tables = self._parts.ledger.block_size, self._parts.ledger.tables
        writing: set[int] = set()
        for flight in (*self.running.values(), *self.suspended.values()):
            for work in flight.plan.work:
                end = -(-(work.start + work.tokens * flight.repeat) // size)
                writing.update(tables.get(work.seq, [])[work.start // size : end])
        return next((at for at, block in enumerate(table) if block in writing), len(table))

    def ahead(self) -> list[tuple[Sequence[Job], int]]:
        """Whose repeated plans have run so many steps that were not told: what is known of them is so far behind."""
        found = []
        for plan, flight in self.running.items():
            if flight.repeat > 1:
                steps = cast(RepeatingExecutor, self._executor).num_ended(plan)
                if steps:
                    found.append((flight.jobs, steps))
        return found

    def interrupt(self, plan: PlanId) -> None:
        flight = self.running[plan]
        if not flight.is_stopping:
            flight.is_stopping = True
            self._executor.interrupt(plan, self._executor.caps.yield_grain)

    def resume(self, now: float, plan: PlanId) -> None:
        flight = self.suspended.pop(plan)
        assert flight.paused_at is not None, "it is suspended"
        flight.paused_s += now - flight.paused_at
        flight.paused_at, flight.activation_bytes, flight.is_stopping = None, 0, False
        self.running[plan] = flight
        self._executor.resume(plan)

    def apply_yielded(self, now: float, yielded: Yielded) -> None:
        flight = self.running.pop(yielded.plan)
        flight.paused_at, flight.activation_bytes = now, yielded.activation_bytes
        suspended = Suspended(
            at=now,
            who=self._parts.name,
            plan=yielded.plan,
            activation_bytes=yielded.activation_bytes,
        )
        self._parts.emit(suspended)
        self.suspended[yielded.plan] = flight
        if not self._interrupts:
            self.resume(now, yielded.plan)  # somebody else interrupted it
        elif all(job.is_cancelled for job in flight.jobs):
            self._abort(now, self.suspended.pop(yielded.plan))

    def abort_unwanted(self, now: float) -> None:
        """Give up suspended plans of which nobody wants anything any more."""
        for plan, flight in list(self.suspended.items()):
            if all(job.is_cancelled for job in flight.jobs):
                self._abort(now, self.suspended.pop(plan))

    def _abort(self, now: float, flight: Flight) -> None:
        self._executor.abort(flight.plan.id)
        if flight.plan.images:
            self._parts.roster.images.end(flight.plan.images, is_done=False)
        for work, job in zip(flight.plan.work, flight.jobs, strict=True):
            job.in_flight -= work.tokens
            self._parts.finish(now, job, "cancelled")

    def lanes(self, count: int) -> tuple[tuple[float, int], ...]:
        """Share and tokens of what runs in each of several lanes, for reports."""
        if count == 1:
            return ()
        by_lane = {flight.plan.lane: flight.plan for flight in self.running.values()}
        plans = [by_lane.get(lane) for lane in range(count)]
        return tuple(
            [
                (0.0, 0) if one is None else (one.share, sum([work.tokens for work in one.work]))
                for one in plans
            ]
        )

    def check(self, running: Sequence[Job]) -> None:
        """What jobs have in flight is what plans hold of them."""
        flying: dict[int, int] = {}
        for flight in (*self.running.values(), *self.suspended.values()):
            for work in flight.plan.work:
                flying[work.seq] = flying.get(work.seq, 0) + work.tokens
        for job in running:
            assert job.in_flight == flying.get(job.seq, 0), f"in_flight of job {job.seq} is off"


def seen(flights: dict[PlanId, Flight], now: float) -> Sequence[Flying]:
    """As policies see them."""
    return [flight.seen(now) for flight in flights.values()] if flights else ()
