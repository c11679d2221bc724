"""Jobs that stand still before a stage until they move: prompts computed here, answers written elsewhere.

A job that is to pause behind its first token is taken out of the running in the turn in which that came, before another
step is decided; one that is to pause behind its images, when the last of them is encoded. It is held with its blocks
like one that leaves (engine.partings), who may then take it at once. It goes on here when its fleet says so: nobody
else has room, or the movement came to nothing.

Who hears only of the end hears of the pause as an output without tokens; of that behind images everybody does.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import UNSET

from penstock.core.images import is_encoded
from penstock.core.moving import PauseAsked, WentOn
from penstock.core.records import Record
from penstock.core.types import Job, Output, Stage, Status
from penstock.engine.parts import Parts


class Pausing(Record):
    """Asked from outside, right behind the request."""

    request: str
    before: Stage = "decode"


class GoingOn(Record):
    request: str


class Pauses:
    """One per replica."""

    def __init__(self, parts: Parts, ask_again: Callable[[], None]) -> None:
        self._parts, self._ask_again = parts, ask_again
        self.asked: dict[str, Stage] = {}  # who is to pause
        self._paused: dict[str, tuple[Job, Status]] = {}

    def apply(self, now: float, order: Pausing | GoingOn) -> None:
        if isinstance(order, Pausing):
            before = order.before
            told = PauseAsked(
                at=now,
                who=self._parts.name,
                request=order.request,
                before=UNSET if before == "decode" else before,
            )
            self._parts.emit(told)
            self.asked[order.request] = before
            return
        self._parts.emit(WentOn(at=now, who=self._parts.name, request=order.request))
        self.asked.pop(order.request, None)
        self._go_on(order.request)

    def look(self, now: float) -> None:
        """Pause whoever has come so far; let go who was cancelled meanwhile."""
        for request, before in list(self.asked.items()):
            jobs = self._parts.roster.jobs_of(request)
            if not jobs:
                del self.asked[request]
            elif len(jobs) == 1 and _has_come(jobs[0], before):
                del self.asked[request]
                self._pause(jobs[0], is_heard=jobs[0].is_streamed and before == "decode")
        for request, (job, _) in list(self._paused.items()):
            if job.is_cancelled:
                self._go_on(request)
                self._parts.finish(now, job, "cancelled")

    def take(self, request: str) -> Status | None:
        """What a paused job was, for who leaves with it; None: it does not pause."""
        self.asked.pop(request, None)
        paused = self._paused.pop(request, None)
        return None if paused is None else paused[1]

    def _pause(self, job: Job, *, is_heard: bool) -> None:
        roster = self._parts.roster
        self._paused[job.request.id] = (job, job.status)
        roster.hold(job)
        if not is_heard:
            roster.outputs.append((job.request.id, Output(job.answer, (), 0)))

    def _go_on(self, request: str) -> None:
        paused = self._paused.pop(request, None)
        if paused is not None:
            self._parts.roster.take_back(*paused)
            self._ask_again()


def _has_come(job: Job, before: Stage) -> bool:
    """Whether it is to stand still now."""
    if job.in_flight or job.status == "in_transfer":
        return False
    if before == "decode":
        return job.num_output > 0
    return is_encoded(job) and not job.computed
