"""HTTP to one foreign server: connections that are kept, bodies sent as they are, failures by our own names.

Everything that can go wrong before the answer's first byte is told apart by what a fleet should do about it:

    no connection                   Unreached, a ReplicaLost: nobody should ask there now
    hung up                         ReplicaLost       the server is gone; another one may take it
    429                             Overloaded        it is full
    503                             ReplicaLost       it is not ready, or going down
    400 413 415 422, 404 of a model BadRequest ...    the caller's, and every other server would say the same
    401 403, 404 408 5xx, silence   UpstreamFailed    its fault, or ours in how it is set up; another may do

A connection that was kept may have been closed by the other side at the moment it is used again. Such a call is made
once more on a fresh one: no byte of an answer has been seen. Connections are kept KEEP_S, less than what the servers
in question keep them (uvicorn: 5 s).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

import aiohttp
import msgspec
from yarl import URL

from penstock.core.errors import (
    BadRequest,
    ContextTooLong,
    Overloaded,
    PenstockError,
    ReplicaLost,
    UnknownModel,
    UpstreamFailed,
)

KEEP_S = 4.0
END_S = 1.0
MAX_ERROR_BYTES = 64 * 1024
AGAIN = "send the request again"
HUNG_UP = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError)


class Unreached(ReplicaLost):
    """Nobody listens there."""


class _Told(msgspec.Struct):
    """OpenAI's error, inside `error` or as the body itself."""

    message: str | None = None
    param: str | None = None
    code: str | int | None = None
    detail: object = None


class _Body(msgspec.Struct):
    error: _Told | str | None = None
    message: str | None = None
    detail: object = None


class Answer:
    """An answer of status 200 on its way. Close it whatever happens; a whole one leaves its connection to the next."""

    __slots__ = ("_answer", "_upstream")

    def __init__(self, answer: aiohttp.ClientResponse, upstream: Upstream) -> None:
        self._answer, self._upstream = answer, upstream

    @property
    def is_events(self) -> bool:
        return self._answer.headers.get("content-type", "").startswith("text/event-stream")

    async def some(self) -> bytes:
        """What has come since the last call, waiting if nothing has; empty at the end. Raises PenstockError."""
        try:
            return await self._answer.content.readany()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._upstream.lost(error) from None

    async def whole(self) -> bytes:
        """All of it. Raises PenstockError."""
        try:
            return await self._answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._upstream.lost(error) from None

    async def end(self) -> None:
        """Wait for the end of a body that has said all, so that its connection can be used again."""
        content = self._answer.content
        if not content.at_eof():
            with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
                async with asyncio.timeout(END_S):
                    await content.readany()

    def close(self) -> None:
        if self._answer.content.at_eof():
            self._answer.release()
        else:
            self._answer.close()


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
        self._headers = {"content-type": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=connect_timeout_s, sock_read=idle_timeout_s
        )
        self._urls: dict[str, URL] = {}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
            auto_decompress=True,
        )

    def _at(self, path: str) -> URL:
        found = self._urls.get(path)
        if found is None:
            found = self._urls[path] = URL(self.url + path)
        return found

    async def post(self, path: str, body: bytes, name: str) -> Answer:
        """The answer, its head read and its status 200; `name` is the request's. Raises PenstockError."""
        headers = {**self._headers, "x-request-id": name}
        try:
            answer = await self._post(path, body, headers)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self.lost(error) from None
        if answer.status != 200:
            async with answer:
                raise await self._refusal(answer)
        return Answer(answer, self)

    async def _post(
        self, path: str, body: bytes, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        url = self._at(path)
        try:
            return await self._session.post(url, data=body, headers=headers, timeout=self._timeout)
        except aiohttp.ClientConnectorError:
            raise
        except HUNG_UP:
            return await self._session.post(url, data=body, headers=headers, timeout=self._timeout)

    def lost(self, error: BaseException) -> PenstockError:
        """What a failed connection means, before the answer or inside it."""
        if isinstance(error, aiohttp.ClientConnectorError) or "sock_connect" in str(error):
            return Unreached(f"the server at {self.url} cannot be reached", hint=AGAIN)
        if isinstance(error, TimeoutError):
            return UpstreamFailed(f"the server at {self.url} fell silent", hint=AGAIN)
        return ReplicaLost(f"the server at {self.url} hung up", hint=AGAIN)

    async def _refusal(self, answer: aiohttp.ClientResponse) -> PenstockError:
        try:
            body = await answer.content.read(MAX_ERROR_BYTES)
        except (TimeoutError, aiohttp.ClientError, OSError):
            body = b""
        return error_of(self.url, answer.status, body, answer.headers.get("retry-after"))

    async def get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        """Status and body. Raises ReplicaLost or UpstreamFailed."""
        try:
            async with asyncio.timeout(timeout_s):
                async with self._session.get(self._at(path), headers=self._headers) as answer:
                    return answer.status, await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self.lost(error) from None

    async def close(self) -> None:
        await self._session.close()


def _said(body: bytes) -> tuple[str, str | None, str]:
    """Message, parameter and code of an error's body, whatever its shape."""
    try:
        told = msgspec.json.decode(body, type=_Body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body[:200].decode("utf-8", "replace").strip(), None, ""
    inner = told.error
    if isinstance(inner, _Told):
        return inner.message or "", inner.param, str(inner.code or "")
    detail = told.detail if isinstance(told.detail, str) else None
    if told.detail is not None and detail is None:
        detail = msgspec.json.encode(told.detail)[:500].decode()
    return inner or told.message or detail or "", None, ""


def error_of(url: str, status: int, body: bytes, retry_after: str | None = None) -> PenstockError:
    """A refusal by our own name; see the module's text."""
    message, param, code = _said(body)
    message = message or f"it answered with status {status}"
    if status == 429:
        seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
        return Overloaded(message, hint="try again later", retry_after_s=seconds)
    if status == 503:
        return ReplicaLost(f"the server at {url} is not ready: {message}", hint=AGAIN)
    if status in (401, 403):
        return UpstreamFailed(
            f"the server at {url} does not accept this server's key",
            hint="set fleet.N.remote.api_key",
        )
    if status == 404 and (code == "model_not_found" or "model" in message.lower()):
        return UnknownModel(message, param=param or "model")
    if code == "context_length_exceeded":
        return ContextTooLong(message, param=param)
    if status in (400, 409, 413, 415, 422):
        return BadRequest(message, param=param)
    if status in (404, 405, 501):
        return UpstreamFailed(f"the server at {url} does not offer this path: {message}")
    return UpstreamFailed(f"the server at {url} failed: {message}", hint=AGAIN)
