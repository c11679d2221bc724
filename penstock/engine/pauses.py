"""Jobs that stand still behind their first token until they move: prompts computed here, answers written elsewhere.

A job that is to pause is taken out of the running in the turn in which its first token came, before another step is
decided, and held with its blocks like one that leaves (engine.partings), who may then take it at once. It goes on here
when its fleet says so: nobody else has room, or the movement came to nothing.

Who hears only of the end hears of the pause as an output without tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from penstock.core.moving import PauseAsked, WentOn
from penstock.core.types import Job, Output, Status
from penstock.engine.parts import Parts


class Pausing(Struct, gc=False):
    """Asked from outside, right behind the request."""

    request: str


class GoingOn(Struct, gc=False):
    request: str


class Pauses:
    """One per replica."""

    def __init__(self, parts: Parts, ask_again: Callable[[], None]) -> None:
        self._parts, self._ask_again = parts, ask_again
        self._asked: set[str] = set()
        self._paused: dict[str, tuple[Job, Status]] = {}

    @property
    def is_waiting(self) -> bool:
        """Whether somebody is to pause."""
        return bool(self._asked)

    def apply(self, now: float, order: Pausing | GoingOn) -> None:
        if isinstance(order, Pausing):
            self._parts.emit(PauseAsked(at=now, who=self._parts.name, request=order.request))
            self._asked.add(order.request)
            return
        self._parts.emit(WentOn(at=now, who=self._parts.name, request=order.request))
        self._asked.discard(order.request)
        self._go_on(order.request)

    def look(self, now: float) -> None:
        """Pause whoever has its first token; let go who was cancelled meanwhile."""
        for request in list(self._asked):
            jobs = self._parts.roster.jobs_of(request)
            if not jobs:
                self._asked.discard(request)
            elif len(jobs) == 1 and jobs[0].num_output and not jobs[0].in_flight:
                self._asked.discard(request)
                self._pause(jobs[0])
        for request, (job, _) in list(self._paused.items()):
            if job.is_cancelled:
                self._go_on(request)
                self._parts.finish(now, job, "cancelled")

    def take(self, request: str) -> Status | None:
        """What a paused job was, for who leaves with it; None: it does not pause."""
        self._asked.discard(request)
        paused = self._paused.pop(request, None)
        return None if paused is None else paused[1]

    def _pause(self, job: Job) -> None:
        roster = self._parts.roster
        self._paused[job.request.id] = (job, job.status)
        roster.hold(job)
        if not job.is_streamed:
            roster.outputs.append((job.request.id, Output(job.answer, (), 0)))

    def _go_on(self, request: str) -> None:
        paused = self._paused.pop(request, None)
        if paused is not None:
            self._parts.roster.take_back(*paused)
            self._ask_again()
