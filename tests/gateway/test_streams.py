"""Streams under stress: slow clients, stalled clients, clients that leave, many at once, shutting down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.core.types import Request
from penstock.gateway.app import create_app
from penstock.gateway.config import GatewayConfig
from penstock.gateway.server import Server
from penstock.gateway.text import TextModel
from penstock.sim.loop import run as run_virtual
from tests.gateway.conftest import ANSWER, Start
from tests.gateway.scripted import Scripted

LONG = 400  # tokens, each "Hello"
HELLO: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 100, "stream": True}


class Pipe:
    """An ASGI client whose buffer holds one message: `send` waits until it is read."""

    def __init__(self, body: dict[str, Any], path: str = "/v1/completions") -> None:
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [],
            "query_string": b"",
        }
        self._body = json.dumps(body).encode()
        self._is_sent = False
        self.gone = asyncio.Event()
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue(maxsize=1)

    async def receive(self) -> dict[str, Any]:
        if not self._is_sent:
            self._is_sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await self.messages.put(message)


def texts_of(data: bytes) -> list[str]:
    events = [event.removeprefix("data: ") for event in data.decode().split("\n\n") if event]
    return [json.loads(event)["choices"][0]["text"] for event in events if event != "[DONE]"]


@pytest.fixture
def long_service(text: TextModel) -> Scripted:
    (hello,) = text.encode("Hello")

    def script(request: Request, answer: int) -> list[int]:
        return [hello] * LONG

    return Scripted(script)


async def test_a_slow_client_gets_larger_events(text: TextModel, long_service: Scripted) -> None:
    """The service is done long before the client has read, and no token is lost or doubled."""
    app = create_app(long_service, {"tiny": text})
    pipe = Pipe(HELLO | {"max_tokens": LONG})
    call = asyncio.create_task(app(pipe.scope, pipe.receive, pipe.send))
    while not long_service.finished:
        await asyncio.sleep(0)
    assert not call.done()
    bodies = []
    while not call.done() or not pipe.messages.empty():
        with contextlib.suppress(TimeoutError):
            bodies.append(await asyncio.wait_for(pipe.messages.get(), 0.05))
    told = [text for body in bodies for text in texts_of(body.get("body", b""))]
    assert "".join(told) == "Hello" * LONG
    assert len(told) < 10


async def test_slow_clients_do_not_hold_up_others(text: TextModel, long_service: Scripted) -> None:
    app = create_app(long_service, {"tiny": text})
    stuck = [Pipe(HELLO) for _ in range(5)]
    calls = [asyncio.create_task(app(p.scope, p.receive, p.send)) for p in stuck]  # type: ignore[arg-type]
    await asyncio.sleep(0.01)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://p") as http:
        told = await http.post("/v1/completions", json=HELLO)
    assert "".join(texts_of(told.content)) == "Hello" * 100
    for pipe in stuck:
        pipe.gone.set()
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)


async def test_a_stalled_client_is_dropped(
    text: TextModel, long_service: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    """And it is said once, in our words."""
    long_service.step_s = 0.005
    app = create_app(long_service, {"tiny": text}, GatewayConfig(stall_timeout_s=0.1))
    pipe = Pipe(HELLO)
    await asyncio.wait_for(app(pipe.scope, pipe.receive, pipe.send), 2)  # type: ignore[arg-type]
    assert long_service.cancelled and not long_service.running
    Server(app)
    logging.getLogger("uvicorn.error").error("ASGI callable returned without completing response.")
    logging.getLogger("uvicorn.error").error("something else")
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == ["a caller read nothing for 0.1 s: its answer is dropped", "something else"]


async def test_a_reading_client_is_not_dropped(text: TextModel, long_service: Scripted) -> None:
    """Slower than the stall timeout as a whole, but never still for so long."""
    long_service.step_s = 0.005
    app = create_app(long_service, {"tiny": text}, GatewayConfig(stall_timeout_s=0.1))
    pipe = Pipe(HELLO | {"max_tokens": 60})
    call = asyncio.create_task(app(pipe.scope, pipe.receive, pipe.send))  # type: ignore[arg-type]
    told: list[str] = []
    while True:
        message = await pipe.messages.get()
        told += texts_of(message.get("body", b""))
        if message["type"] == "http.response.body" and not message["more_body"]:
            break
        await asyncio.sleep(0.02)
    await call
    assert "".join(told) == "Hello" * 60


@pytest.mark.parametrize("is_stream", [True, False])
async def test_leaving_before_the_first_token(
    text: TextModel, long_service: Scripted, is_stream: bool
) -> None:
    long_service.step_s = 30
    app = create_app(long_service, {"tiny": text})
    pipe = Pipe(HELLO | {"stream": is_stream, "n": 2, "prompt": ["a", "b"]})
    call = asyncio.create_task(app(pipe.scope, pipe.receive, pipe.send))  # type: ignore[arg-type]
    await asyncio.sleep(0.01)
    assert len(long_service.running) == 2
    pipe.gone.set()
    await asyncio.wait_for(call, 1)
    assert len(long_service.cancelled) == 2 and pipe.messages.empty()


async def test_leaving_while_the_buffer_is_full(text: TextModel, long_service: Scripted) -> None:
    """The service hears of it although the writer is stuck."""
    long_service.step_s = 0.001
    app = create_app(long_service, {"tiny": text})
    pipe = Pipe(HELLO | {"max_tokens": LONG})
    call = asyncio.create_task(app(pipe.scope, pipe.receive, pipe.send))  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    pipe.gone.set()
    await asyncio.sleep(0.01)
    assert long_service.cancelled
    call.cancel()
    await asyncio.wait([call])


async def test_one_answer_stopped_early_waits_for_the_others(
    text: TextModel, service: Scripted
) -> None:
    def script(request: Request, answer: int) -> list[int]:
        return text.encode("Hello STOP never" if answer == 0 else "Hello world " * 5)

    service.script, service.step_s = script, 0.001
    app = create_app(service, {"tiny": text})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://p") as http:
        body = HELLO | {"n": 2, "stop": "STOP", "stream": False}
        told = (await http.post("/v1/completions", json=body)).json()
    assert [choice["text"] for choice in told["choices"]] == ["Hello ", "Hello world " * 5]
    assert service.finished and not service.cancelled


def test_the_whole_gateway_in_virtual_time(text: TextModel, service: Scripted) -> None:
    """An hour of waiting takes none, and two runs are equal to the byte."""
    service.step_s = 60.0

    async def main() -> tuple[float, list[bytes]]:
        config = GatewayConfig(thread_above_chars=None, request_prefix="v")
        app = create_app(service, {"tiny": text}, config)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://p", timeout=None
        ) as http:
            calls = (http.post("/v1/completions", json=HELLO) for _ in range(20))
            told = await asyncio.gather(*calls)
        return asyncio.get_running_loop().time(), [answer.content for answer in told]

    first_at, first = run_virtual(main())
    again_at, again = run_virtual(main())
    assert "".join(texts_of(first[0])) == ANSWER
    assert first_at == again_at > 600
    strip = [data.replace(b'"created"', b"") for data in first]
    assert len(strip) == 20 and [texts_of(d) for d in first] == [texts_of(d) for d in again]


async def raw_post(url: str, body: dict[str, Any]) -> bytes:
    """One POST over a socket of its own; the chunks of the answer, joined."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n" % len(data) + data
    )
    raw = await reader.read()
    writer.close()
    _, _, rest = raw.partition(b"\r\n\r\n")
    chunks = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    return b"".join(chunks)


def test_many_real_streams_at_once(start: Start, service: Scripted) -> None:
    """200 sockets: nothing lost, nothing doubled, nothing left running."""
    service.step_s = 0.002
    url = start(service)

    async def main() -> list[str]:
        told = await asyncio.gather(*(raw_post(url, HELLO) for _ in range(200)))
        return ["".join(texts_of(data)) for data in told]

    assert asyncio.run(main()) == [ANSWER] * 200
    assert not service.running and not service.cancelled


def test_a_client_that_reads_nothing_does_not_stall_others(
    start: Start, text: TextModel, long_service: Scripted
) -> None:
    """A real socket with a tiny buffer, left unread."""
    url = start(long_service)
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        stuck.connect((host, int(port)))
        body = json.dumps(HELLO | {"n": 100, "max_tokens": LONG}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        stuck.sendall(head.encode() + body)
        for _ in range(3):
            told = httpx.post(f"{url}/v1/completions", json=HELLO, timeout=5)
            assert "".join(texts_of(told.content)) == "Hello" * 100
    deadline = time.monotonic() + 10
    while long_service.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not long_service.running


SERVE = """
import asyncio, sys
from pathlib import Path
from penstock.gateway.app import create_app
from penstock.gateway.config import GatewayConfig
from penstock.gateway.server import serve
from penstock.gateway.text import TextModel
from tests.gateway.scripted import Scripted
text = TextModel.load(Path(sys.argv[1]))
service = Scripted(lambda request, answer: [*text.encode("Hello world " * 10), 0], step_s=float(sys.argv[2]))
app = create_app(service, {"tiny": text}, GatewayConfig(port=0))
asyncio.run(serve(app, on_ready=lambda url: print(url, flush=True)))
"""


@pytest.mark.parametrize("is_patient", [True, False], ids=["one signal", "two signals"])
def test_sigterm(folder: Path, is_patient: bool) -> None:
    """The first SIGTERM lets a running stream end and refuses new work; the second one ends all."""
    step_s = 0.1 if is_patient else 0.5
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(folder), str(step_s)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        told: list[bytes] = []
        has_begun = threading.Event()

        def read() -> None:
            with (
                contextlib.suppress(httpx.HTTPError),
                httpx.stream("POST", f"{url}/v1/completions", json=HELLO, timeout=20) as answer,
            ):
                for data in answer.iter_raw():
                    told.append(data)
                    has_begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert has_begun.wait(20)
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/health").status_code != 503:
            time.sleep(0.01)
        refused = httpx.post(f"{url}/v1/completions", json=HELLO)
        assert refused.status_code == 503 and "retry-after" in refused.headers
        if not is_patient:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        reader.join(20)
        is_whole = b"".join(told).endswith(b"data: [DONE]\n\n")
        assert is_whole == is_patient
        if is_patient:
            assert "".join(texts_of(b"".join(told))) == "Hello world " * 10
    finally:
        process.kill()
        process.wait()
