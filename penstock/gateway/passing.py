"""One exchange that is passed on, between the service and the caller (see exchange, which does it for token ids).

What the server says is noted as it comes, and the writer takes all that is there at once. What can pile up before a
slow caller is bounded by the length of one answer. The caller's leaving is noticed by a task that listens for it, and
ends the exchange at once, before the first byte too.
"""

from __future__ import annotations

import asyncio

from starlette.types import Receive

from penstock.core.forward import Forward
from penstock.core.ports import StartService
from penstock.core.types import Output, Request
from penstock.gateway.metrics import ModelMeter
from penstock.gateway.wire import ClientGone


class Passing:
    """One exchange as the gateway sees it: pieces come in, and the caller may leave. Leaving the context ends it."""

    def __init__(self, service: StartService, request: Request, receive: Receive) -> None:
        self._service, self._request, self._receive = service, request, receive
        self._loop = asyncio.get_running_loop()
        self._pending: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._has_ended = False
        self.finish_reason = "stop"
        self.arrived_at = self._loop.time()
        self.first_at: float | None = None
        self.last_at: float | None = None

    async def __aenter__(self) -> Passing:
        self._watcher = self._loop.create_task(self._watch())
        try:
            self._call = self._service.start(self._request, self._ended, self._hear)
        except BaseException:
            self._watcher.cancel()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watcher.cancel()
        if not self._has_ended:
            self._call.cancel()

    @property
    def is_over(self) -> bool:
        """Whether no more pieces will come."""
        return self._has_ended and not self._pending and self._error is None

    def finish(self) -> None:
        """From here on the caller may leave."""
        self._watcher.cancel()

    async def take(self) -> bytes | None:
        """All that was heard since the last time, waiting if nothing was; None after the last.

        Raises why it went wrong once all before has been taken; ClientGone at once.
        """
        while True:
            pending = self._pending
            if pending:
                piece = pending[0] if len(pending) == 1 else b"".join(pending)
                pending.clear()
                return piece
            if self._error is not None:
                raise self._error
            if self._has_ended:
                return None
            self._waiter = self._loop.create_future()
            await self._waiter

    def _hear(self, output: Output) -> None:
        self.last_at = self._loop.time()
        if self.first_at is None:
            self.first_at = self.last_at
        if output.finish is not None:
            self.finish_reason = output.finish
        if output.data:
            self._pending.append(output.data)
            self._wake()

    def _ended(self, error: Exception | None) -> None:
        self._has_ended = True
        if error is not None:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._pending.clear()
        self._error = ClientGone()
        self._wake()


def measure(meter: ModelMeter, passing: Passing, forward: Forward) -> None:
    """Once a call: counts as the server told them, times as the caller saw them."""
    usage, first, last = forward.usage, passing.first_at, passing.last_at
    if usage is None or first is None or last is None:
        return
    meter.generated += usage.num_output
    if usage.is_counted:
        meter.prompt_tokens.inc(usage.num_prompt)
        meter.looked_up_tokens.inc(usage.num_prompt)
        meter.cached_tokens.inc(usage.num_cached)
        meter.prompt_sizes.observe(usage.num_prompt)
    meter.output_sizes.observe(usage.num_output)
    meter.finished(passing.finish_reason).inc()
    meter.latency.observe(last - passing.arrived_at)
    if forward.is_stream:
        meter.ttft.observe(first - passing.arrived_at)
        if usage.num_output > 1:
            meter.tpot.observe((last - first) / (usage.num_output - 1))
