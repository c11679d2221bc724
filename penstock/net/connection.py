"""One HTTP/1.1 connection to a foreign server: an exchange at a time, told to a `Receiver` as its bytes come.

httptools (the parser of uvicorn and of Node) takes the messages apart. All that one read of the socket brought is
told in one piece: a server that is ahead of us costs a call a read, not one a chunk. Nothing waits here and no task
is made; a client library with streams and futures costs several times as much an exchange, which is most of what a
gateway does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

import httptools


class Receiver(Protocol):
    """Who hears of an exchange. After `on_data` with `is_last`, or after `on_lost`, nothing more comes."""

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None: ...

    def on_data(self, data: bytes, is_last: bool) -> None: ...

    def on_lost(self, error: Exception, *, is_unheard: bool) -> None:
        """The connection broke, or fell silent (TimeoutError); `is_unheard`: not a byte of an answer had come."""
        ...


class Connection(asyncio.Protocol):
    """`on_free` hears when it can be used again, `on_closed` when it never will be."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_free: Callable[[Connection], None],
        on_closed: Callable[[Connection], None],
    ) -> None:
        self._loop = loop
        self._on_free, self._on_closed = on_free, on_closed
        self._receiver: Receiver | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._idle_s: float | None = None
        self.freed_at = self._heard_at = loop.time()
        self.num_exchanges = 0
        self.is_closed = False

    def begin(self, told: bytes, receiver: Receiver, idle_s: float | None) -> None:
        """Send a request. No other exchange may be under way."""
        assert self._receiver is None and not self.is_closed
        self._receiver, self._idle_s = receiver, idle_s
        self._parser = httptools.HttpResponseParser(self)
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._is_told = self._is_complete = self._is_heard = self._is_kept = False
        self.num_exchanges += 1
        self._heard_at = self._loop.time()
        if idle_s is not None and self._timer is None:
            self._timer = self._loop.call_later(idle_s, self._look)
        self._transport.write(told)

    def abort(self) -> None:
        """Nobody wants to hear of it any more."""
        self._receiver = None
        self.close()

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._transport.abort()

    # ---------------------------------------------------------------- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._receiver is None:
            self.close()  # nobody asked
            return
        self._heard_at, self._is_heard = self._loop.time(), True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._lose(ConnectionError(f"what it says is no HTTP: {error}"))
            return
        self._tell()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        receiver = self._receiver
        if receiver is not None and self._is_told and self._ends_by_closing() and error is None:
            self._receiver = None
            receiver.on_data(b"", True)
        elif receiver is not None:
            self._lose(error or ConnectionError("the connection was closed"))
        self._on_closed(self)

    # ---------------------------------------------------------------- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        if self._status < 200:  # only a word before the answer
            self._headers = {}
            self._status = 0
        else:
            self._is_complete = True
            self._is_kept = self._parser.should_keep_alive()  # it forgets this afterwards

    # ---------------------------------------------------------------- inside

    def _tell(self) -> None:
        receiver = self._receiver
        if self._status >= 200 and not self._is_told and receiver is not None:
            self._is_told = True
            receiver.on_head(self._status, self._headers)
        if not (self._parts or self._is_complete) or self._receiver is None:
            return
        assert receiver is not None
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        if not self._is_complete:
            receiver.on_data(data, False)
            return
        self._receiver = None
        if self._is_kept:
            self.freed_at = self._loop.time()
            self._on_free(self)
        else:
            self.close()
        receiver.on_data(data, True)

    def _ends_by_closing(self) -> bool:
        return b"content-length" not in self._headers and b"transfer-encoding" not in self._headers

    def _lose(self, error: Exception) -> None:
        receiver, self._receiver = self._receiver, None
        self.close()
        if receiver is not None:
            receiver.on_lost(error, is_unheard=not self._is_heard)

    def _look(self) -> None:
        """Has it been silent for too long? One timer, set again for the rest of the time."""
        self._timer = None
        if self._receiver is None or self._idle_s is None:
            return
        left_s = self._heard_at + self._idle_s - self._loop.time()
        if left_s <= 0:
            self._lose(TimeoutError("it fell silent"))
        else:
            self._timer = self._loop.call_later(left_s, self._look)
