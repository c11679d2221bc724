"""The callers of a run with faults: they check every token the instant they hear of it, and that they hear of one end.

What a caller may hear is known beforehand (sim.speech.said), so a token that is wrong, missing or told twice is found
where it happens. An error is an end as good as an answer if something happened in the run that explains it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial

from penstock.core.clock import now
from penstock.core.errors import PenstockError
from penstock.core.ports import Call, StartService
from penstock.core.types import Output
from penstock.lab.fault_case import Ask
from penstock.sim.speech import said

LOSSES = frozenset({"kill", "stall", "cut", "restart"})
EXPLAINED: Mapping[str, frozenset[str]] = {
    "ReplicaLost": LOSSES,
    "StepFailed": frozenset({"step"}),
}
ALWAYS = frozenset({"Overloaded"})  # queues are bounded


class Broken(AssertionError):
    """What must never happen. `what`: lost, doubled, wrong, leaked, owners or crashed."""

    def __init__(self, what: str, told: str) -> None:
        super().__init__(told)
        self.what = what


class CallersOwn(Exception):
    """What a callback of a caller raises, whatever it meant."""


class Caller:
    """One request and what came of it."""

    def __init__(
        self, ask: Ask, kinds: frozenset[str], tell: Callable[[], None], *, context: int
    ) -> None:
        """`tell` hears whenever something came; `context`: tokens that a replica holds of one answer."""
        request = ask.request
        self.ask, self.name = ask, request.id
        self._kinds, self._tell = kinds, tell
        self.broken: Broken | None = (
            None  # raised in a callback, so the fleet takes it for the caller's own
        )
        assert request.true_output is not None
        most = min(request.sampling.max_tokens, context - request.prompt.num_tokens)
        self._reason = "length" if most < request.true_output else "stop"
        length = min(most, request.true_output)
        self._right = said(request.prompt.ids, length)  # type: ignore[attr-defined]
        self._got = [0] * request.n
        self._ends: list[str | None] = [None] * request.n
        self.num_heard = 0
        self.end = ""  # answered, left, gone, or the class of an error
        self.left_at: float | None = None
        self.call: Call | None = None
        self.on_heard: Callable[[Caller], None] = lambda caller: None

    @property
    def is_over(self) -> bool:
        return bool(self.end)

    def begin(self, service: StartService) -> None:
        """Ask; an error at once is an end too."""
        hear = self._hear if self.ask.every_token else None
        if self.ask.is_task:
            task = asyncio.get_running_loop().create_task(service.submit(self.ask.request, hear))
            task.add_done_callback(self._task_ended)
            self.call = task
            return
        try:
            self.call = service.start(self.ask.request, self._ended, hear)
        except PenstockError as error:
            self._ended(error)

    def leave(self, end: str = "left") -> None:
        """Cancel. `end` "gone": with the controller, whom nobody can tell any more."""
        if self.is_over:
            return
        self.end, self.left_at = end, now()
        if self.call is not None:
            self.call.cancel()

    # ---------------------------------------------------------------- what it hears

    def _hear(self, output: Output) -> None:
        self._tell()
        if isinstance(self.call, asyncio.Task) and not self.call.done() and self.end == "left":
            return  # a task hears that it is cancelled on its next turn
        try:
            self._check(output)
        except Broken as broken:
            self.broken = broken
            raise
        self.num_heard += 1
        self.on_heard(self)

    def _check(self, output: Output) -> None:
        if self.is_over:
            raise Broken("doubled", f"{self.name} hears {output} after its end ({self.end})")
        place, begin = output.answer, self._got[output.answer]
        if self._ends[place] is not None:
            raise Broken("doubled", f"answer {place} of {self.name} goes on after its end")
        told = self._right[begin : begin + len(output.ids)]
        if output.ids != told:
            is_old = output.ids == self._right[begin - len(output.ids) : begin]
            what = "doubled" if begin and is_old else "wrong"
            raise Broken(what, f"{self.name}.{place} at {begin}: {output.ids}, and {told} is right")
        self._got[place] = begin + len(output.ids)
        self._ends[place] = output.finish
        if output.finish in ("stop", "length"):
            self._check_end(place, output)

    def _check_end(self, place: int, output: Output) -> None:
        if self._got[place] != len(self._right):
            told = f"{self.name}.{place} ends with {self._got[place]} of {len(self._right)} tokens"
            raise Broken("lost", told)
        if output.finish != self._reason:
            told = f"{self.name}.{place} ends as {output.finish}, not {self._reason}"
            raise Broken("wrong", told)

    def _ended(self, error: Exception | None) -> None:
        self._tell()
        if self.is_over:
            raise Broken("doubled", f"{self.name} ends again ({self.end}, {error!r})")
        if error is None:
            self._check_whole()
            self.end = "answered"
            return
        self.end = type(error).__name__
        if isinstance(error, CallersOwn):
            return
        if isinstance(error, Broken):
            raise error
        if not isinstance(error, PenstockError):
            raise Broken("crashed", f"{self.name} ends with {error!r}") from error
        if self.end not in ALWAYS and not EXPLAINED.get(self.end, frozenset()) & self._kinds:
            raise Broken("lost", f"{self.name} ends with {error!r}, for which there is no reason")

    def _check_whole(self) -> None:
        if self.ask.every_token and not all(end in ("stop", "length") for end in self._ends):
            raise Broken("lost", f"{self.name} is said to be answered, with ends {self._ends}")

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            if not self.is_over:
                raise Broken("lost", f"{self.name} was cancelled by nobody")
        elif not self.is_over:
            self._ended(task.exception())  # type: ignore[arg-type]


def moody(caller: Caller, callers: list[Caller], ask_more: Callable[[], None]) -> None:
    """Have a caller do in its callback what callbacks should not."""
    mood = caller.ask.mood
    if mood != "patient":
        caller.on_heard = partial(_misbehave, mood=mood, callers=callers, ask_more=ask_more)


def _misbehave(
    caller: Caller, *, mood: str, callers: list[Caller], ask_more: Callable[[], None]
) -> None:
    if caller.num_heard != 2:
        return
    if mood == "raises":
        raise CallersOwn("a caller's own mistake")
    if mood == "leaves-inside":
        caller.leave()
    elif mood == "asks-inside":
        ask_more()
    elif mood == "ends-others":
        for other in callers[:: max(1, len(callers) // 3)]:
            if other is not caller:
                other.leave()
