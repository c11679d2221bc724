"""Plays a trace on a Service: open loop, so a slow service is not spared the next request.

The same code runs on the wall clock and in virtual time. Requests arrive at their instants whatever happens
to earlier ones; only memory bounds how many are under way. What they meet is the business of the service's log;
here only refusals are counted, and how late requests were sent when the machine could not keep up. A workflow begins at
its instant and goes on as its answers come; see `lab.workflow`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from penstock.core.clock import now
from penstock.core.errors import PenstockError
from penstock.core.ports import Call, StartService
from penstock.core.types import Request
from penstock.lab.workflow import WorkflowFigures, Workflows
from penstock.traffic import Item, Workflow


@dataclass(slots=True)
class Played:
    """How a trace went down. `errors` counts refusals and failures by the name of the error's class.

    `messages` holds the first of each.
    """

    num_sent: int = 0
    num_served: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    started_at: float = 0.0
    ended_at: float = 0.0
    max_lateness_s: float = 0.0
    workflows: dict[str, WorkflowFigures] = field(default_factory=dict)  # by kind, when all ended


async def play(
    trace: Iterable[tuple[float, Item]],
    service: StartService,
    *,
    on_progress: Callable[[Played], None] | None = None,
) -> Played:
    """Submit every request at its instant, counted from now; return when all have ended.

    `on_progress` is called after every request sent. What is no PenstockError is a bug and ends the play.
    """
    player = _Player(iter(trace), service, on_progress)
    try:
        player.advance()
        await player.done
    finally:
        player.cancel()
    player.played.ended_at, player.played.workflows = now(), player.workflows.figures()
    return player.played


class _Player:
    """Sends what is due and sets a timer for what is next: no request has a task, a million none at all."""

    def __init__(
        self,
        trace: Iterator[tuple[float, Item]],
        service: StartService,
        on_progress: Callable[[Played], None] | None,
    ) -> None:
        self.played = Played(started_at=now())
        self._trace, self._service, self._on_progress = trace, service, on_progress
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()
        self._next = next(trace, None)
        self._timer: asyncio.TimerHandle | None = None
        self._calls: dict[int, Call | None] = {}  # by number begun; None while it starts
        self._num_begun = 0
        self.workflows = Workflows(self._ask)

    def advance(self, is_due: bool = False) -> None:
        """Send all that is due. `is_due`: the next one's timer has fired."""
        try:
            while self._next is not None and not self.done.done():
                at_s, item = self._next
                delay_s = self.played.started_at + at_s - self._loop.time()
                if delay_s > 0 and not is_due:
                    self._timer = self._loop.call_later(delay_s, self.advance, True)
                    return
                is_due = False
                self.played.max_lateness_s = max(self.played.max_lateness_s, -delay_s)
                self._num_begun += 1
                if isinstance(item, Workflow):
                    self._begin(item, self.played.started_at + at_s, self._num_begun)
                else:
                    self._send(item, self._num_begun)
                self._next = next(self._trace, None)
        except Exception as error:  # noqa: BLE001 - a callback has no caller: whoever waits gets it
            self._fail(error)
        self._end_if_over()

    def cancel(self) -> None:
        """Stop sending, and let go of all that runs."""
        if self._timer is not None:
            self._timer.cancel()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if call is not None:
                call.cancel()

    def _begin(self, workflow: Workflow, at: float, number: int) -> None:
        def on_done(task: asyncio.Task[bool]) -> None:
            self._calls.pop(number, None)
            error = None if task.cancelled() else task.exception()
            if error is not None:
                self._fail(error)
            self._end_if_over()

        task = self._loop.create_task(self.workflows.play(workflow, at))
        self._calls[number] = task
        task.add_done_callback(on_done)

    async def _ask(self, request: Request, at: float) -> bool:
        """One call of a workflow: whether it was answered."""
        self._tell_sent()
        try:
            await self._service.submit(request)
        except PenstockError as error:
            self._count(error)
            return False
        self.played.num_served += 1
        return True

    def _send(self, request: Request, number: int) -> None:
        self._calls[number] = None
        try:
            call = self._service.start(request, partial(self._on_ended, number))
        except PenstockError as error:
            del self._calls[number]
            self._count(error)
        else:
            if number in self._calls:  # it has not ended on the spot
                self._calls[number] = call
        self._tell_sent()

    def _tell_sent(self) -> None:
        self.played.num_sent += 1
        if self._on_progress is not None:
            self._on_progress(self.played)

    def _on_ended(self, number: int, error: Exception | None) -> None:
        self._calls.pop(number, None)
        if error is None:
            self.played.num_served += 1
        elif isinstance(error, PenstockError):
            self._count(error)
        else:
            self._fail(error)
        self._end_if_over()

    def _count(self, error: PenstockError) -> None:
        code = type(error).__name__
        self.played.errors[code] = self.played.errors.get(code, 0) + 1
        self.played.messages.setdefault(code, str(error))

    def _fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def _end_if_over(self) -> None:
        if self._next is None and not self._calls and not self.done.done():
            self.done.set_result(None)
