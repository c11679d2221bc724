"""One HTTP call's dealings with the service and with its client.

    submit tasks --Outputs--> pending --take--> writer --send--> client
         ^                                                          |
         +----------------- cancelled when the client leaves <------+

Outputs are only noted when they come, so a step of the engine never waits for a client. The writer takes all that
is pending at once: a client that reads slowly gets the same tokens in fewer, larger events. What can pile up is
bounded by what was asked for (n * max_tokens ids) beside the transport's own 64 KiB; a client that takes no byte
for `stall_timeout_s` is dropped. The client's leaving is noticed by a task that listens for it, not by a failing
write, so work that nobody reads stops at once also before the first token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.types import Receive, Send

from penstock.core.errors import StepFailed
from penstock.core.ports import Service
from penstock.core.types import Output, Request
from penstock.gateway.wire import ClientGone

logger = logging.getLogger(__name__)

Heard = tuple[int, Output]  # the request an Output belongs to, by its place in the call


class Exchange:
    """Use as an async context: leaving it ends whatever still runs."""

    def __init__(self, service: Service, requests: Sequence[Request], receive: Receive) -> None:
        self._service = service
        self._requests = requests
        self._receive = receive
        self._pending: list[Heard] = []
        self._waiter: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._watcher: asyncio.Task[None] | None = None
        self._closed: set[int] = set()
        self._num_open = len(requests)
        self._error: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self.arrived_at = self._loop.time()
        self.first_at: float | None = None
        self.last_at: float | None = None

    async def __aenter__(self) -> Exchange:
        loop = self._loop
        for prompt, request in enumerate(self._requests):
            task = loop.create_task(self._service.submit(request, partial(self._hear, prompt)))
            task.add_done_callback(partial(self._ended, prompt))
            self._tasks.append(task)
        self._watcher = loop.create_task(self._watch())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After a failure everything is cancelled; else the service is left to finish by itself."""
        self.finish()
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        assert self._watcher is not None
        rest = [task for task in (*self._tasks, self._watcher) if not task.done()]
        if rest:
            await asyncio.wait(rest)

    @property
    def elapsed_s(self) -> float:
        return self._loop.time() - self.arrived_at

    def finish(self) -> None:
        """The answer is about to be complete: from here on the client may leave."""
        assert self._watcher is not None
        self._watcher.cancel()

    def _hear(self, prompt: int, output: Output) -> None:
        if prompt in self._closed:
            return
        if output.num_tokens:
            self.last_at = self._loop.time()
            if self.first_at is None:
                self.first_at = self.last_at
        self._pending.append((prompt, output))
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _ended(self, prompt: int, task: asyncio.Task[None]) -> None:
        self._num_open -= 1
        if not task.cancelled():
            self._fail(task.exception())
        elif prompt not in self._closed:
            self._fail(StepFailed("the request was cancelled inside the server"))
        self._wake()

    def _fail(self, error: BaseException | None) -> None:
        if error is not None and self._error is None:
            self._error = error
            self._wake()

    async def _watch(self) -> None:
        """Wait for the client to leave; then stop all work for it."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._fail(ClientGone())
        for prompt in range(len(self._tasks)):
            self.close(prompt)

    def close(self, prompt: int) -> None:
        """No more tokens of this request are wanted."""
        self._closed.add(prompt)
        self._tasks[prompt].cancel()

    async def take(self) -> list[Heard] | None:
        """All that was heard since the last call, waiting for the next if nothing was; None after the last.

        Raises what `submit` raised once everything heard before has been taken; ClientGone at once.
        """
        while True:
            if self._error is not None and (
                not self._pending or isinstance(self._error, ClientGone)
            ):
                raise self._error
            if self._pending:
                taken, self._pending = self._pending, []
                return taken
            if self._num_open == 0:
                return None
            self._waiter = self._loop.create_future()
            await self._waiter


class Writer:
    """Sends an event stream; starts it with the first bytes, so that an early error still has its own status.

    One timer a stream looks now and then whether the send it saw last time is still the one in progress; a stall is
    noticed after one to one and a half times the limit.
    """

    def __init__(
        self, send: Send, headers: list[tuple[bytes, bytes]], stall_timeout_s: float | None
    ) -> None:
        self._send = send
        self._headers = headers
        self._limit_s = stall_timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None
        self._num_sends = 0
        self._is_sending = False
        self._is_stalled = False
        self.has_begun = False

    async def write(self, data: bytes, *, is_last: bool = False) -> None:
        """Send, waiting while the client's buffer is full. Raises ClientGone after the stall timeout."""
        self._num_sends += 1
        self._is_sending = True
        try:
            if not self.has_begun:
                await self._begin()
            await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})
        except asyncio.CancelledError:
            if self._is_stalled and self._task is not None:
                self._task.uncancel()
                raise ClientGone from None
            raise
        finally:
            self._is_sending = False

    async def _begin(self) -> None:
        self.has_begun = True
        self._task = asyncio.current_task()
        if self._limit_s is not None:
            self._look(self._limit_s / 2, 0, 0)
        await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})

    def _look(self, every_s: float, seen: int, times: int) -> None:
        """`times` looks in a row found send number `seen` in progress; the third is one too many."""
        times = times + 1 if self._is_sending and seen == self._num_sends else 0
        if times == 2 and self._task is not None:
            self._is_stalled = True
            self._task.cancel()
            logger.warning("a caller read nothing for %g s: its answer is dropped", self._limit_s)
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(every_s, self._look, every_s, self._num_sends, times)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
