"""What the front door costs: streams of 64 tokens to 32 clients, beside a bare ASGI app on the same server.

    python benchmarks/http_streaming.py [--requests 2000] [--rounds 3] [--json]

Both apps run on uvicorn (uvloop, httptools) in a process of their own, started one after the other in each round, so
that a noisy machine disturbs both. The bare app reads the body and sends 64 prepared events; ours decodes and checks
the body, tokenises the prompt, submits to a service that steps once a turn of the loop, and turns ids into text
and text into events, each token its own. User and system time are told apart because the system's share is mostly
the waking of the client: the bare app outruns the client, which then reads many events at once, while ours lets it
keep up and pays for waking it at every event, as every server does whose tokens come a step apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, cast

import uvicorn
import uvloop

from penstock.core.ports import OnOutput
from penstock.core.types import Output, Report, Request
from penstock.engine.folder import DEFAULT_FOLDER
from penstock.gateway.app import create_app
from penstock.gateway.config import GatewayConfig
from penstock.gateway.server import Server, listen, url_of
from penstock.gateway.text import TextModel

TOKENS = 64
CLIENTS = 32
TIMEOUT_S = 120
BODY = json.dumps(
    {"model": "default", "prompt": "def main():", "max_tokens": TOKENS, "stream": True}
).encode()
EVENT = (
    b'data: {"id":"cmpl-0","object":"text_completion","created":1700000000,"model":"default","choices":'
    b'[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}\n\n'
)


class NullService:
    """A step each turn of the loop, one token of every running request a step, nothing computed."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids
        self._running: dict[str, tuple[Request, OnOutput, asyncio.Future[None]]] = {}
        self._said: dict[str, int] = {}
        self._stepper: asyncio.Task[None] | None = None

    def models(self) -> Sequence[str]:
        return ("default",)

    async def submit(self, request: Request, on_output: OnOutput | None = None) -> None:
        assert on_output is not None
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running[request.id] = request, on_output, done
        self._said[request.id] = 0
        if self._stepper is None or self._stepper.done():
            self._stepper = asyncio.create_task(self._steps())
        await done

    async def _steps(self) -> None:
        while self._running:
            for id, (request, on_output, done) in list(self._running.items()):
                place = self._said[id]
                self._said[id] = place + 1
                is_last = place + 1 == request.sampling.max_tokens
                token = self._ids[place % len(self._ids)]
                on_output(Output(0, (token,), 1, "length" if is_last else None))
                if is_last:
                    del self._running[id], self._said[id]
                    done.set_result(None)
            await asyncio.sleep(0)

    def reports(self) -> Sequence[Report]:
        return ()

    async def drain(self) -> None:
        return None


async def bare_app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(TOKENS):
        await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def serve(which: str) -> None:
    """The child's life: print the URL, serve until killed."""
    text = TextModel.load(DEFAULT_FOLDER)
    service = NullService(text.encode("import os, sys\n\nfor name in sys.argv: print(name)\n"))
    server = Server(create_app(service, {"default": text}, GatewayConfig()))
    if which == "bare":
        server.config.app = bare_app
        server.config.loaded_app = bare_app
    listener = listen("127.0.0.1", 0)
    print(url_of(listener), flush=True)  # noqa: T201
    uvloop.run(server._serve([listener]))


def cpu_seconds(pid: int) -> tuple[float, float]:
    """User and system time of a process so far."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / tick, int(fields[12]) / tick


class Client(asyncio.Protocol):
    """Asks again as soon as an answer is complete; answers end with the empty chunk."""

    def __init__(self, left: list[int], done: asyncio.Future[None]) -> None:
        self._left, self._done, self._tail = left, done, b""
        self._ask = (
            b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(BODY)
        ) + BODY

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._next()

    def _next(self) -> None:
        if self._left[0] == 0:
            self._transport.close()
            if not self._done.done():
                self._done.set_result(None)
            return
        self._left[0] -= 1
        self._transport.write(self._ask)

    def data_received(self, data: bytes) -> None:
        self._tail = self._tail[-4:] + data[-5:] if len(data) < 5 else data[-5:]
        if self._tail.endswith(b"0\r\n\r\n"):
            self._next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(error or ConnectionError("the server hung up"))


async def load(url: str, num_requests: int) -> None:
    host, port = url.removeprefix("http://").split(":")
    loop = asyncio.get_running_loop()
    left = [num_requests]
    waits = []
    for _ in range(CLIENTS):
        done: asyncio.Future[None] = loop.create_future()
        waits.append(done)
        await loop.create_connection(lambda done=done: Client(left, done), host, int(port))  # type: ignore[misc]
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*waits)


def measure(which: str, num_requests: int) -> dict[str, float]:
    """Requests a second, and user and system milliseconds a request, of one server process."""
    child = subprocess.Popen(
        [sys.executable, __file__, "--serve", which],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        url = child.stdout.readline().strip()
        uvloop.run(load(url, CLIENTS * 4))
        before, began = cpu_seconds(child.pid), time.perf_counter()
        uvloop.run(load(url, num_requests))
        took, after = time.perf_counter() - began, cpu_seconds(child.pid)
        return {
            "requests_per_s": num_requests / took,
            "user_ms": (after[0] - before[0]) / num_requests * 1e3,
            "system_ms": (after[1] - before[1]) / num_requests * 1e3,
        }
    finally:
        child.kill()
        child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=("bare", "ours"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        serve(flags.serve)
        return
    rounds = [
        {which: measure(which, flags.requests) for which in ("bare", "ours")}
        for _ in range(flags.rounds)
    ]
    names = ("requests_per_s", "user_ms", "system_ms")
    report = {
        which: {name: statistics.median(r[which][name] for r in rounds) for name in names}
        for which in ("bare", "ours")
    }
    ratios = [r["ours"]["user_ms"] / r["bare"]["user_ms"] for r in rounds]
    if flags.json:
        print(json.dumps({**report, "user_ratios": ratios, "uvicorn": uvicorn.__version__}))
        return
    print(
        f"{TOKENS} tokens a stream, {CLIENTS} clients, {flags.requests} streams, {flags.rounds} rounds"
    )
    for which, title in (("bare", "bare ASGI app"), ("ours", "penstock gateway")):
        row = report[which]
        print(
            f"{title:18} {row['requests_per_s']:7.0f} streams/s   CPU ms a stream: "
            f"{row['user_ms']:.2f} user, {row['system_ms']:.2f} system"
        )
    print(f"ratio of user time, by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
