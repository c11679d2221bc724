"""Foreign servers for tests: another gateway of ours over a scripted service, and one that misbehaves as told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from penstock.assemble import Leaves, assemble, load_config
from penstock.assemble.config import Config
from penstock.assemble.remotes import Remotes
from penstock.cluster.fleets import Fleets
from penstock.gateway.app import Gateway, create_app
from penstock.gateway.config import GatewayConfig
from penstock.gateway.server import Server, listen, url_of
from penstock.report.log import Null

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@contextlib.asynccontextmanager
async def running(app: Gateway) -> AsyncIterator[str]:
    """A real server on this loop; its URL."""
    listener = listen(app.config.host, app.config.port)
    server = Server(app)
    task = asyncio.create_task(server._serve([listener]))
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield url_of(listener)
    finally:
        server.stop()
        server.stop()
        await task
        listener.close()


def config_of(urls: Sequence[str], *sets: str, **remote: object) -> Config:
    """Foreign servers that are looked at often."""
    quick = {"probe_s": 0.05, "probe_timeout_s": 3.0, "max_failures": 1, **remote}
    flags = {f"fleet.0.remote.{name}": value for name, value in quick.items()}
    return load_config(flags={"fleet.0.remote.urls": list(urls), **flags}, sets=sets)


@dataclass
class Front:
    url: str
    service: Fleets
    app: Gateway


@contextlib.asynccontextmanager
async def front(config: Config, **gateway: object) -> AsyncIterator[Front]:
    """`penstock serve --remote` without its process."""
    remotes = Remotes(b"key")

    async def start(*_: object) -> None:
        raise AssertionError("there is no engine here")

    try:
        config = await remotes.expand(config, lambda phase: None)
        leaves = Leaves(
            start=start, stop=remotes.close, log=lambda who: Null(), remote=remotes.ports
        )
        service = await assemble(config, leaves)
        app = create_app(
            service,
            remotes.texts(config),
            GatewayConfig(port=0, **gateway),  # type: ignore[arg-type]
            hash_key=b"key",
            foreign=service.models(),
        )
        async with running(app) as url:
            yield Front(url, service, app)
        await service.stop()
    finally:
        await remotes.close()


Reply = Callable[[asyncio.StreamWriter], object]


def whole(status: int, table: object, more: str = "") -> bytes:
    body = json.dumps(table).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{more}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(word: str) -> bytes:
    table = {"model": "m", "choices": [{"index": 0, "delta": {"content": word}}]}
    return b"data: " + json.dumps(table).encode() + b"\n\n"


@dataclass
class Rude:
    """Says `answer` to every POST, then hangs up (`hangs_up`), or says no more (`goes_silent`)."""

    answer: bytes = b""
    hangs_up: bool = False
    goes_silent: bool = False
    models: Sequence[str] = ("m",)
    metrics: str | None = None
    bodies: list[dict[str, object]] = field(default_factory=list)
    _open: list[asyncio.StreamWriter] = field(default_factory=list)
    num_left: int = 0  # connections on which the caller hung up while we were silent

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.append(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                if head.startswith("get"):
                    writer.write(self._look(head.split()[1]))
                    continue
                size = int(head.split("content-length:")[1].split()[0])
                self.bodies.append(json.loads(await reader.readexactly(size)))
                writer.write(self.answer)
                await writer.drain()
                if self.goes_silent:
                    await reader.read()
                    self.num_left += 1
                    break
                if self.hangs_up:
                    break
        writer.close()

    def _look(self, path: str) -> bytes:
        if path == "/v1/models":
            return whole(200, {"object": "list", "data": [{"id": name} for name in self.models]})
        if path == "/metrics" and self.metrics is not None:
            body = self.metrics.encode()
            return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        return whole(404, {"detail": "Not Found"})

    @contextlib.asynccontextmanager
    async def up(self, port: int = 0) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        host, port = server.sockets[0].getsockname()[:2]
        try:
            yield f"http://{host}:{port}"
        finally:
            server.close()
            for writer in self._open:
                writer.transport.abort()
            self._open.clear()
