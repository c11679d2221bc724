"""A foreign server reached over HTTP: connections that are kept, bodies sent as they are.

A connection that was kept may have been closed by the other side at the moment it is used again. Such a call is made
once more on a fresh one: no byte of an answer has been seen. Connections are kept KEEP_S, less than what the servers
in question keep them (uvicorn: 5 s), the youngest is used first, and those that are left over are closed by the
server.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Protocol
from urllib.parse import urlsplit

from penstock.core.errors import PenstockError, ReplicaLost, UpstreamFailed
from penstock.net.connection import Connection, Receiver
from penstock.net.refusals import AGAIN, Unreached, error_of

KEEP_S = 4.0
EVENTS = b"text/event-stream"
MAX_ERROR_BYTES = 64 * 1024


class Listener(Protocol):
    """Who hears of an exchange. After `answered` with `is_last`, or after `failed`, nothing more comes."""

    def begun(self, is_events: bool) -> None:
        """It is answered with status 200, by a stream of events or otherwise."""
        ...

    def answered(self, data: bytes, is_last: bool) -> None: ...

    def failed(self, error: PenstockError) -> None: ...


class Exchange:
    """One call, from `Upstream.post` on; a net.connection.Receiver."""

    __slots__ = (
        "_upstream", "_told", "_listener", "_connection", "_task", "_status", "_wait", "_refusal", "_is_over",
    )  # fmt: skip

    def __init__(self, upstream: Upstream, told: bytes, listener: Listener) -> None:
        self._upstream, self._told, self._listener = upstream, told, listener
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._status = 0
        self._wait = b""
        self._refusal = b""
        self._is_over = False
        self._send(upstream.idle())

    def cancel(self) -> None:
        """Stop it, and hear no more; the server learns by its connection being closed."""
        self._is_over = True
        if self._task is not None:
            self._task.cancel()
        if self._connection is not None:
            self._connection.abort()

    def _send(self, connection: Connection | None) -> None:
        if connection is None:
            self._task = asyncio.get_running_loop().create_task(self._connect())
        else:
            self._connection = connection
            connection.begin(self._told, self, self._upstream.idle_timeout_s)

    async def _connect(self) -> None:
        url = self._upstream.url
        try:
            connection = await self._upstream.connect()
        except (OSError, TimeoutError):
            self._fail(Unreached(f"the server at {url} cannot be reached", hint=AGAIN))
            return
        finally:
            self._task = None
        if self._is_over:
            connection.close()
        else:
            self._send(connection)

    def _fail(self, error: PenstockError) -> None:
        if not self._is_over:
            self._is_over = True
            self._listener.failed(error)

    # ---------------------------------------------------------------- net.connection.Receiver

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status = status
        if status == 200:
            self._listener.begun(headers.get(b"content-type", b"").startswith(EVENTS))
        else:
            self._wait = headers.get(b"retry-after", b"")

    def on_data(self, data: bytes, is_last: bool) -> None:
        if is_last:
            self._connection = None
        if self._is_over:
            return
        if self._status == 200:
            self._is_over = is_last
            self._listener.answered(data, is_last)
            return
        self._refusal += data[: MAX_ERROR_BYTES - len(self._refusal)]
        if is_last:
            wait = self._wait.decode("latin-1")
            self._fail(error_of(self._upstream.url, self._status, self._refusal, wait))

    def on_lost(self, error: Exception, *, is_unheard: bool) -> None:
        url = self._upstream.url
        connection, self._connection = self._connection, None
        if isinstance(error, TimeoutError):
            self._fail(UpstreamFailed(f"the server at {url} fell silent", hint=AGAIN))
        elif is_unheard and connection is not None and connection.num_exchanges > 1:
            self._send(None)  # it had been kept for too long
        else:
            self._fail(ReplicaLost(f"the server at {url} hung up", hint=AGAIN))


class Upstream:
    """One server. Make it inside a running loop, `close` it at the end."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        connect_timeout_s: float = 5.0,
        idle_timeout_s: float | None = 600.0,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.idle_timeout_s = idle_timeout_s
        parts = urlsplit(self.url)
        self._host = parts.hostname or ""
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (80 if self._ssl is None else 443)
        key = f"authorization: Bearer {api_key}\r\n" if api_key is not None else ""
        self._path = parts.path
        self._head = f" HTTP/1.1\r\nhost: {parts.netloc.rpartition('@')[2]}\r\naccept: */*\r\n{key}"
        self._connect_timeout_s = connect_timeout_s
        self._loop = asyncio.get_running_loop()
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()

    def post(self, path: str, body: bytes, name: str, listener: Listener) -> Exchange:
        """Send a body; `name` is the request's. The listener hears on later turns of the loop."""
        head = (
            f"POST {self._path}{path}{self._head}content-type: application/json\r\n"
            f"x-request-id: {name}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return Exchange(self, head.encode() + body, listener)

    async def get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        """Status and body. Raises ReplicaLost or UpstreamFailed."""
        done: asyncio.Future[tuple[int, bytes]] = self._loop.create_future()
        told = f"GET {self._path}{path}{self._head}connection: close\r\n\r\n".encode()
        connection = None
        try:
            async with asyncio.timeout(timeout_s):
                connection = (
                    await self.connect()
                )  # a fresh one: it is asked whether anybody listens
                connection.begin(told, _Whole(done), None)
                return await done
        except TimeoutError:
            raise UpstreamFailed(f"the server at {self.url} fell silent", hint=AGAIN) from None
        except OSError:
            raise Unreached(f"the server at {self.url} cannot be reached", hint=AGAIN) from None
        finally:
            if connection is not None and not done.done():
                connection.abort()

    def idle(self) -> Connection | None:
        """A kept connection that is likely to be good."""
        oldest = self._loop.time() - KEEP_S
        while self._idle:
            connection = self._idle.pop()
            if connection.freed_at >= oldest and not connection.is_closed:
                return connection
            connection.close()
        return None

    async def connect(self) -> Connection:
        """A fresh one. Raises OSError or TimeoutError."""
        async with asyncio.timeout(self._connect_timeout_s):
            _, connection = await self._loop.create_connection(
                lambda: Connection(self._loop, self._idle.append, self._forget),
                self._host,
                self._port,
                ssl=self._ssl,
            )
        self._open.add(connection)
        return connection

    def _forget(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    async def close(self) -> None:
        for connection in list(self._open):
            connection.abort()
        self._idle.clear()


class _Whole(Receiver):
    """Collects a short answer."""

    def __init__(self, done: asyncio.Future[tuple[int, bytes]]) -> None:
        self._done, self._status, self._got = done, 0, bytearray()

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status = status

    def on_data(self, data: bytes, is_last: bool) -> None:
        self._got += data
        if is_last and not self._done.done():
            self._done.set_result((self._status, bytes(self._got)))

    def on_lost(self, error: Exception, *, is_unheard: bool) -> None:
        if not self._done.done():
            self._done.set_exception(ConnectionError(str(error)))
