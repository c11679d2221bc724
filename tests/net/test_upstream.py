"""HTTP to foreign servers, against servers that are written byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from penstock.core.errors import (
    BadRequest,
    ContextTooLong,
    Overloaded,
    PenstockError,
    ReplicaLost,
    UnknownModel,
    UpstreamFailed,
)
from penstock.net.refusals import Unreached, error_of
from penstock.net.upstream import Upstream

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKS = OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
SIZED = OK + b"Content-Length: 6\r\n\r\nonetwo"


class Heard:
    """A Listener that can be waited for."""

    def __init__(self) -> None:
        self.data = b""
        self.pieces: list[bytes] = []
        self.is_events: bool | None = None
        self.error: PenstockError | None = None
        self.over = asyncio.Event()

    def begun(self, is_events: bool) -> None:
        self.is_events = is_events

    def answered(self, data: bytes, is_last: bool) -> None:
        assert not self.over.is_set()
        self.data += data
        self.pieces.append(data)
        if is_last:
            self.over.set()

    def failed(self, error: PenstockError) -> None:
        assert not self.over.is_set()
        self.error = error
        self.over.set()


class Peer:
    """Answers the requests on its connections by `answers`, the last one again and again; None hangs up."""

    def __init__(self, answers: list[bytes | None], *, step: int | None = None) -> None:
        self.answers, self.step = answers, step
        self.num_connections = 0
        self.requests: list[bytes] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().split(b"content-length:")[1].split()[0])
                self.requests.append(head + await reader.readexactly(size))
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if answer is None:
                    break
                step = self.step or len(answer)
                for at in range(0, len(answer), step):
                    writer.write(answer[at : at + step])
                    await writer.drain()
                    if self.step:
                        await asyncio.sleep(0)
                if b"200" in answer and b":" not in answer.lower().split(b"\r\n\r\n")[0]:
                    break  # the body ends with the connection
        writer.close()

    @contextlib.asynccontextmanager
    async def up(self, **how: float | None) -> AsyncIterator[Upstream]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        upstream = Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", **how)  # type: ignore[arg-type]
        try:
            yield upstream
        finally:
            await upstream.close()
            server.close()


async def call(upstream: Upstream) -> Heard:
    heard = Heard()
    upstream.post("/v1/completions", b"{}", "name", heard)
    async with asyncio.timeout(5):
        await heard.over.wait()
    return heard


@pytest.mark.parametrize("step", [None, 1, 7])
@pytest.mark.parametrize(
    "answer",
    [CHUNKS, SIZED, b"HTTP/1.1 200 OK\r\n\r\nonetwo", b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED],
    ids=["chunks", "sized", "until closed", "continue"],
)
async def test_bodies_of_every_form_in_every_cut(answer: bytes, step: int | None) -> None:
    async with Peer([answer], step=step).up() as upstream:
        for _ in range(2):
            heard = await call(upstream)
            assert (heard.error, heard.data, heard.is_events) == (None, b"onetwo", False)
            assert step is not None or len(heard.pieces) <= 2


async def test_a_connection_is_kept_and_used_again() -> None:
    peer = Peer([CHUNKS])
    async with peer.up(api_key="secret") as upstream:
        for _ in range(5):
            assert (await call(upstream)).data == b"onetwo"
        assert peer.num_connections == 1
        told = peer.requests[-1].decode().lower()
        assert told.startswith("post /v1/completions http/1.1\r\n") and told.endswith("\r\n\r\n{}")
        assert "authorization: bearer secret\r\n" in told and "x-request-id: name\r\n" in told
        await asyncio.gather(*(call(upstream) for _ in range(4)))
        assert 1 < peer.num_connections <= 4


async def test_one_that_asks_for_it_is_closed() -> None:
    peer = Peer([SIZED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")])
    async with peer.up() as upstream:
        for _ in range(3):
            assert (await call(upstream)).data == b"onetwo"
        assert peer.num_connections == 3


async def test_a_kept_connection_that_was_closed_meanwhile_is_no_error() -> None:
    peer = Peer([SIZED, None, CHUNKS])
    async with peer.up() as upstream:
        assert (await call(upstream)).data == b"onetwo"
        assert (await call(upstream)).data == b"onetwo"  # hung up on, and asked once more
        assert peer.num_connections == 2 and len(peer.requests) == 3


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, ReplicaLost),
        (OK + b"Content-Length: 9\r\n\r\nonetwo", UpstreamFailed),  # and then silence
        (b"SSH-2.0-x\r\n\r\n", ReplicaLost),
        (b"HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n", UpstreamFailed),
    ],
    ids=["hangs up", "falls silent", "no HTTP", "redirects"],
)
async def test_what_goes_wrong_has_a_name(answer: bytes | None, error: type) -> None:
    async with Peer([answer]).up(idle_timeout_s=0.2) as upstream:
        assert type((await call(upstream)).error) is error


async def test_nobody_listens() -> None:
    async with Peer([None]).up() as upstream:
        pass
    again = Upstream(upstream.url)
    assert type((await call(again)).error) is Unreached
    with pytest.raises(Unreached):
        await again.get("/health", 1.0)


async def test_who_cancels_hears_no_more_and_the_server_does() -> None:
    peer = Peer([OK + b"Content-Length: 9\r\n\r\nonetwo"])
    async with peer.up() as upstream:
        heard = Heard()
        exchange = upstream.post("/", b"{}", "name", heard)
        while not heard.data:
            await asyncio.sleep(0.005)
        exchange.cancel()
        await asyncio.sleep(0.02)
        assert heard.data == b"onetwo" and not heard.over.is_set()
        assert upstream.idle() is None


Make = Callable[[int, bytes], PenstockError]


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (400, b'{"error":{"message":"bad top_p","param":"top_p"}}', BadRequest, "bad top_p"),
        (400, b'{"object":"error","message":"old vLLM","code":400}', BadRequest, "old vLLM"),
        (422, b'{"detail":[{"loc":["body"],"msg":"missing"}]}', BadRequest, "missing"),
        (400, b'{"error":{"message":"long","code":"context_length_exceeded"}}', ContextTooLong, "long"),
        (400, b'{"error":{"message":"exceeds","code":400,"type":"exceed_context_size_error"}}', ContextTooLong, "exc"),
        (404, b'{"error":{"message":"The model `x` does not exist."}}', UnknownModel, "`x`"),
        (404, b'{"detail":"Not Found"}', UpstreamFailed, "does not offer this path"),
        (404, b'{"error":"model \\"x\\" not found, try pulling it first"}', UnknownModel, "pulling"),
        (401, b"", UpstreamFailed, "key"),
        (429, b'{"error":{"message":"slow down"}}', Overloaded, "slow down"),
        (500, b"<html>oops</html>", UpstreamFailed, "oops"),
        (503, b'{"error":{"message":"Loading model","code":503}}', ReplicaLost, "Loading model"),
        (504, b"\xff\xfe", UpstreamFailed, "failed"),
    ],
)  # fmt: skip
def test_refusals_by_our_own_names(status: int, body: bytes, kind: type, said: str) -> None:
    error = error_of("http://a", status, body, "7")
    assert type(error) is kind and said in error.message
    assert error.retry_after_s == (7 if status == 429 else None)
