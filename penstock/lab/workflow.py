"""Plays workflows: each call is asked for when those it comes after have ended, and its wait is over.

The same coroutines run on the wall clock and in virtual time, on a Service and on a URL: all they need is a function
that asks for one request and says whether it was answered. A caller that gives up cancels its request, wherever that
is by then. What comes after a call that was refused, failed or given up is never asked for: the workflow is broken.

E2E of a workflow: from its start to the end of its last call, thinking and tools included. Makespan: from the start of
the first workflow to the end of the last.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from penstock.core.clock import now
from penstock.core.types import Request
from penstock.report.summary import Spread, spread_of
from penstock.traffic import Workflow

Ask = Callable[
    [Request, float], Awaitable[bool]
]  # (request, instant it was wanted at) -> was it answered


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowFigures:
    """What became of the workflows of one kind. `num_whole`: all of their calls were answered."""

    num: int
    num_whole: int
    num_calls: int
    num_abandoned: int
    e2e_s: Spread
    makespan_s: float

    def __str__(self) -> str:
        from penstock.report.table import seconds  # tables bring rich, which few runs need

        told = f"{self.num_whole:,} of {self.num:,} ended whole, {self.num_calls:,} calls"
        if self.num_abandoned:
            told += f", {self.num_abandoned:,} given up"
        spread = self.e2e_s
        told += f"; E2E p50 {seconds(spread.p50)}, p99 {seconds(spread.p99)}"
        return f"{told}, makespan {seconds(self.makespan_s)}"


@dataclass(slots=True)
class Tally:
    """What is gathered about one kind."""

    num: int = 0
    num_calls: int = 0
    num_abandoned: int = 0
    e2e_s: array[float] = field(default_factory=lambda: array("d"))
    started_at: float | None = None
    ended_at: float = 0.0

    def figures(self) -> WorkflowFigures:
        return WorkflowFigures(
            num=self.num,
            num_whole=len(self.e2e_s),
            num_calls=self.num_calls,
            num_abandoned=self.num_abandoned,
            e2e_s=spread_of(self.e2e_s),
            makespan_s=self.ended_at - (self.started_at or 0.0),
        )


class Workflows:
    """Plays any number of workflows with one `ask`, and counts."""

    def __init__(self, ask: Ask, *, on_abandoned: Callable[[Request], None] | None = None) -> None:
        self._ask, self._on_abandoned = ask, on_abandoned
        self._tallies: defaultdict[str, Tally] = defaultdict(Tally)

    def figures(self) -> dict[str, WorkflowFigures]:
        """By kind: "session", "program", "call"."""
        return {kind: tally.figures() for kind, tally in sorted(self._tallies.items())}

    async def play(self, workflow: Workflow, started_at: float) -> bool:
        """Return when nothing more of it will be asked for; True when all calls were answered."""
        tally = self._tallies[workflow.kind]
        tally.num += 1
        if tally.started_at is None:
            tally.started_at = started_at
        run = _Run(workflow, self._ask, tally, self._on_abandoned)
        try:
            is_whole = await run.play(started_at)
        finally:
            tally.ended_at = max(tally.ended_at, now())
        if is_whole:
            tally.e2e_s.append(now() - started_at)
        return is_whole


class _Run:
    """One workflow under way."""

    def __init__(
        self,
        workflow: Workflow,
        ask: Ask,
        tally: Tally,
        on_abandoned: Callable[[Request], None] | None,
    ) -> None:
        self._calls, self._ask, self._tally = workflow.calls, ask, tally
        self._on_abandoned = on_abandoned
        self._left = [len(call.after) for call in self._calls]
        self._next: list[list[int]] = [[] for _ in self._calls]
        for place, call in enumerate(self._calls):
            for before in call.after:
                self._next[before].append(place)
        self._running: dict[asyncio.Task[bool], int] = {}

    async def play(self, started_at: float) -> bool:
        num_answered = 0
        for place, left in enumerate(self._left):
            if not left:
                self._begin(place, started_at)
        try:
            while self._running:
                done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                # A set has no order that two runs share; calls have.
                for task in sorted(done, key=lambda task: self._running[task]):
                    place = self._running.pop(task)
                    if task.result():
                        num_answered += 1
                        self._follow(place)
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
        return num_answered == len(self._calls)

    def _begin(self, place: int, at: float) -> None:
        self._running[asyncio.create_task(self._one(place, at))] = place

    def _follow(self, place: int) -> None:
        at = now()
        for after in self._next[place]:
            self._left[after] -= 1
            if not self._left[after]:
                self._begin(after, at)

    async def _one(self, place: int, at: float) -> bool:
        call = self._calls[place]
        at += call.wait_s
        if at > now():
            await asyncio.sleep(at - now())
        self._tally.num_calls += 1
        if call.abandon_s is None:
            return await self._ask(call.request, at)
        try:
            async with asyncio.timeout_at(at + call.abandon_s):
                return await self._ask(call.request, at)
        except TimeoutError:
            self._tally.num_abandoned += 1
            if self._on_abandoned is not None:
                self._on_abandoned(call.request)
            return False
