"""Plays a trace on a Service: open loop, so a slow service is not spared the next request.

The same coroutine runs on the wall clock and in virtual time. Requests arrive at their instants whatever happens
to earlier ones; only memory bounds how many are under way. What they meet is the business of the service's log;
here only refusals are counted, and how late requests were sent when the machine could not keep up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from penstock.core.clock import now, sleep_until
from penstock.core.errors import PenstockError
from penstock.core.ports import Service
from penstock.core.types import Request


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


async def play(
    trace: Iterable[tuple[float, Request]],
    service: Service,
    *,
    on_progress: Callable[[Played], None] | None = None,
) -> Played:
    """Submit every request at its instant, counted from now; return when all have ended.

    `on_progress` is called after every request sent. What is no PenstockError is a bug and ends the play.
    """
    played = Played(started_at=now())
    open_tasks: set[asyncio.Task[None]] = set()
    failed: list[BaseException] = []

    async def submit(request: Request) -> None:
        try:
            await service.submit(request)
            played.num_served += 1
        except PenstockError as error:
            code = type(error).__name__
            played.errors[code] = played.errors.get(code, 0) + 1
            played.messages.setdefault(code, str(error))

    def on_end(task: asyncio.Task[None]) -> None:
        open_tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            failed.append(error)

    try:
        for at_s, request in trace:
            at = played.started_at + at_s
            await sleep_until(at)
            if failed:
                break
            played.max_lateness_s = max(played.max_lateness_s, now() - at)
            task = asyncio.create_task(submit(request))
            open_tasks.add(task)
            task.add_done_callback(on_end)
            played.num_sent += 1
            if on_progress is not None:
                on_progress(played)
        while open_tasks and not failed:
            await asyncio.wait(open_tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in open_tasks:
            task.cancel()
    if failed:
        raise failed[0]
    played.ended_at = now()
    return played
