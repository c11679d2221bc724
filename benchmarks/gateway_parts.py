"""Where the gateway's CPU goes for one stream of 64 tokens that is passed on: its parts alone, in this process.

    python -m benchmarks.gateway_parts [--times 3000]

Microseconds of this process's CPU. The mock's bytes come in two reads; no sockets, no kernel. "all of it" is the
gateway's application with keys, routing and accounts on, called as uvicorn would call it, before a replica that
answers at once.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

import uvloop

from benchmarks.gateway import CHUNK, DONE, LAST, TOKENS, USAGE, request_bytes
from penstock.cluster.fleet import Fleet
from penstock.cluster.fleets import Fleets
from penstock.cluster.passage import Passage
from penstock.cluster.router import Router
from penstock.core.forward import Forward, ForwardedPrompt, Usage
from penstock.core.messages import Submit
from penstock.core.types import Output, Report, Request, RequestId
from penstock.gateway.app import create_app
from penstock.gateway.config import GatewayConfig
from penstock.gateway.metrics import Meter
from penstock.gateway.passing import measure
from penstock.net.connection import Connection
from penstock.policy.route.prefix import Prefix
from penstock.report.log import Null

EVENTS = [*[CHUNK] * TOKENS, LAST, USAGE, DONE]
STREAM = b"".join(EVENTS)
WIRE = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in EVENTS)
    + b"0\r\n\r\n"
)
BODY = request_bytes(True, False).split(b"\r\n\r\n", 1)[1]
HALF = len(STREAM) // 2


class Deaf:
    """Takes everything and does nothing: a transport, and a receiver."""

    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...
    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None: ...
    def on_data(self, data: bytes, is_last: bool) -> None: ...
    def on_lost(self, error: Exception, *, is_unheard: bool) -> None: ...


class Instant:
    """A replica that answers in two pieces on the next turns of the loop."""

    name = "mock-0"

    def submit(self, asked: Submit, on_output: Any, _: object) -> None:
        request = asked.request
        loop, usage = asyncio.get_running_loop(), Usage(20, TOKENS, 0, True)
        cast(ForwardedPrompt, request.prompt).forward.usage = usage
        loop.call_soon(on_output, Output(0, (), 0, data=STREAM[:HALF]))
        last = Output(0, (), TOKENS, "stop", data=STREAM[HALF:])
        loop.call_soon(loop.call_soon, on_output, last)

    def cancel(self, request_id: str) -> None: ...

    def listen(self, on_report: Callable[[Report], None]) -> None:
        on_report(Report(replica=self.name, at=0.0, block_size=64))


def request_of(number: int) -> Request:
    forward = Forward(path="/v1/chat/completions", body=BODY, model="mock", is_stream=True)
    prompt = ForwardedPrompt(forward, [BODY], key=b"key")
    return Request(id=RequestId(str(number)), model="mock", prompt=prompt)


def scan() -> None:
    passage = Passage(shows_usage=False)
    passage.events(STREAM[:HALF])
    passage.events(STREAM[HALF:])


class Seen:
    finish_reason, arrived_at, first_at, last_at = "stop", 0.5, 1.0, 2.0


async def run(times: int) -> None:
    loop, deaf = asyncio.get_running_loop(), Deaf()

    def say(name: str, work: Callable[[], object]) -> None:
        work()
        began = time.process_time()
        for _ in range(times):
            work()
        print(f"{name:44}{(time.process_time() - began) / times * 1e6:8.1f} us")

    connection = Connection(loop, lambda _: None, lambda _: None)
    connection.connection_made(cast(asyncio.BaseTransport, deaf))

    def read() -> None:
        connection.begin(b"", deaf, None)
        connection.data_received(WIRE[: len(WIRE) // 2])
        connection.data_received(WIRE[len(WIRE) // 2 :])

    say("read: HTTP taken apart (net.connection)", read)
    say("scan: events, usage (cluster.passage)", scan)
    numbers = iter(range(1 << 40))
    say("request: made, its prompt hashed", lambda: request_of(next(numbers)).prompt.blocks(64))
    router = Router("mock", Prefix(), log=Null())
    fleet = Fleet("mock", [cast(Any, Instant())], router)

    def route() -> None:
        request = request_of(next(numbers))
        router.arrive(0.0, request)
        chosen = router.choose(0.0, request)
        assert chosen is not None
        router.end(0.0, request.id, chosen)

    say("route: that, and a choice by prefix", route)
    meter = Meter(lambda: []).of("mock")
    forward = Forward("", b"", is_stream=True, usage=Usage(20, TOKENS, 0, True))
    say("measure: counters and histograms", lambda: measure(meter, cast(Any, Seen), forward))

    config = GatewayConfig(api_keys={"key": "tenant"})
    app = create_app(Fleets({"mock": fleet}), {}, config, foreign=["mock"])
    headers = [(b"host", b"x"), (b"authorization", b"Bearer key")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}

    async def call() -> None:
        left, bodies = asyncio.Event(), iter([BODY])

        async def receive() -> dict[str, Any]:
            for body in bodies:
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None: ...

        await loop.create_task(app(dict(scope), receive, send))

    await call()
    began = time.process_time()
    for _ in range(times):
        await call()
    print(
        f"{'all of it but reading and scanning':44}{(time.process_time() - began) / times * 1e6:8.1f} us"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, default=3000)
    uvloop.run(run(parser.parse_args().times))


if __name__ == "__main__":
    main()
