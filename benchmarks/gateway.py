"""The gateway beside other proxies, in front of one mock server: streams of 64 tokens to 32 clients.

    python -m benchmarks.gateway [--rounds 5] [--seconds 3] [--peers FOLDER] [--only penstock,sglang-router] [--json
    FILE]

Everything of ours is on: a key is asked for and found, the request is routed (policy `prefix`), accounted for by
tenant and measured, the stream's usage is asked for, read and left out again. The others are started as their makers
say, with one server behind them and round robin. The mock (raw ASGI on uvicorn) sends 64 events at once, or (--paced)
one every two milliseconds, as an engine would; then every event passes alone. All proxies are up from the beginning
and are measured in turns, so that what else the machine does meets all of them; figures are medians over rounds, and
a ratio is the median of the rounds' own ratios. CPU is the proxy's own, its children included.

Peers are found by their commands on PATH or in FOLDER/*/bin: `sglang-router` and `vllm-router` (Rust; packages of
these names), `litellm` (package `litellm[proxy]`). Those that are not there are listed as not run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import uvloop

TOKENS = 64
RUST = ("sglang-router", "vllm-router")
PEERS = (*RUST, "litellm")
PACE_S = 0.002
KEY = "sk-" + secrets.token_hex(16)
TICK = os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- the mock


def _event(table: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(table, separators=(",", ":")).encode() + b"\n\n"


HEAD = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "mock"}
CHUNK = _event(
    {**HEAD, "choices": [{"index": 0, "delta": {"content": "tok "}, "finish_reason": None}]}
)
LAST = _event({**HEAD, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
COUNTS = {"prompt_tokens": 20, "completion_tokens": TOKENS, "total_tokens": 20 + TOKENS}
USAGE = _event({**HEAD, "choices": [], "usage": COUNTS})
DONE = b"data: [DONE]\n\n"
WHOLE = {
    "index": 0,
    "finish_reason": "stop",
    "message": {"role": "assistant", "content": "tok " * TOKENS},
}
BODY = json.dumps(
    {**HEAD, "object": "chat.completion", "choices": [WHOLE], "usage": COUNTS}
).encode()
MODELS = json.dumps(
    {"object": "list", "data": [{"id": "mock", "object": "model", "created": 1}]}
).encode()
INFO = json.dumps(
    {"model_path": "mock", "status": "ready", "is_generation": True, "served_model_name": "mock", "model_id": "mock"}
).encode()  # fmt: skip


async def mock(scope: dict[str, Any], receive: Any, send: Any) -> None:
    plain = [(b"content-type", b"application/json")]

    async def whole(body: bytes) -> None:
        sized = [*plain, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": sized})
        await send({"type": "http.response.body", "body": body})

    if scope["type"] != "http":
        return
    if scope["method"] != "POST":
        await whole(MODELS if scope["path"].endswith("/models") else INFO)
        return
    data = b""
    while True:
        message = await receive()
        data += message.get("body", b"")
        if not message.get("more_body"):
            break
    asked = json.loads(data)
    if not asked.get("stream"):
        await whole(BODY)
        return
    events = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": events})
    pause_s = PACE_S if b"PACED" in data else 0.0
    for _ in range(TOKENS):
        if pause_s:
            await asyncio.sleep(pause_s)
        await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
    await send({"type": "http.response.body", "body": LAST, "more_body": True})
    if (asked.get("stream_options") or {}).get("include_usage"):
        await send({"type": "http.response.body", "body": USAGE, "more_body": True})
    await send({"type": "http.response.body", "body": DONE})


# ---------------------------------------------------------------- the clients


def request_bytes(stream: bool, paced: bool) -> bytes:
    words = ("PACED " if paced else "") + "Say hello to the world, please. " * 4
    body = {"model": "mock", "stream": stream, "max_tokens": TOKENS,
            "messages": [{"role": "user", "content": words}]}  # fmt: skip
    told = json.dumps(body).encode()
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {KEY}\r\ncontent-length: {len(told)}\r\n\r\n"
    ).encode() + told


class Client(asyncio.Protocol):
    """Asks again as soon as an answer is complete, until it is told to end."""

    def __init__(self, ask: bytes, stream: bool, until: float, took: list[float]) -> None:
        self._ask, self._stream, self._until, self._took = ask, stream, until, took
        self._got = bytearray()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def _next(self) -> None:
        self._got.clear()
        self._began = time.perf_counter()
        self._transport.write(self._ask)

    def data_received(self, data: bytes) -> None:
        self._got += data
        if not self._is_whole():
            return
        now = time.perf_counter()
        self._check()
        self._took.append(now - self._began)
        if now < self._until:
            self._next()
        elif not self.done.done():
            self._transport.close()
            self.done.set_result(None)

    def _is_whole(self) -> bool:
        if self._stream:
            return self._got.endswith(b"0\r\n\r\n")
        head, mark, body = self._got.partition(b"\r\n\r\n")
        if not mark:
            return False
        told = head.lower().partition(b"content-length:")[2]
        if not told:
            return self._got.endswith(b"0\r\n\r\n")
        return len(body) >= int(told.split(b"\r\n")[0])

    def _check(self) -> None:
        if b" 200 " not in self._got[:16] or self._got.count(b"tok ") < TOKENS:
            if not self.done.done():
                self.done.set_exception(
                    RuntimeError(bytes(self._got[:300]).decode(errors="replace"))
                )

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the proxy hung up"))


async def load(
    port: int, ask: bytes, stream: bool, clients: int, seconds: float
) -> tuple[list[float], float]:  # noqa: PLR0913
    """Seconds of each answer, and of the whole."""
    loop, took, began = asyncio.get_running_loop(), [], time.perf_counter()
    ends = []
    for _ in range(clients):
        _, client = await loop.create_connection(
            lambda: Client(ask, stream, began + seconds, took), "127.0.0.1", port
        )
        ends.append(client.done)
    async with asyncio.timeout(seconds + 60):
        await asyncio.gather(*ends)
    return took, time.perf_counter() - began


# ---------------------------------------------------------------- the proxies


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return int(some.getsockname()[1])


def found(name: str, folder: Path | None) -> str | None:
    here = sorted(folder.glob(f"*/bin/{name}")) if folder is not None else []
    return str(here[0]) if here else shutil.which(name)


def command_of(name: str, program: str, port: int, url: str, scratch: Path) -> list[str]:
    if name == "penstock":
        sets = [f'gateway.api_keys={{{json.dumps(KEY)} = "bench"}}']
        told = [word for one in sets for word in ("--set", one)]
        return [
            sys.executable,
            "-m",
            "penstock",
            "serve",
            "--remote",
            url,
            "--port",
            str(port),
            *told,
        ]
    if name in RUST:
        return [program, *(["launch"] if name == "sglang-router" else []),
                "--worker-urls", url, "--host", "127.0.0.1", "--port", str(port),
                "--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(free_port())]  # fmt: skip
    path = scratch / "litellm.yaml"
    path.write_text(
        "model_list:\n  - model_name: mock\n    litellm_params: "
        f"{{model: openai/mock, api_base: '{url}/v1', api_key: x}}\n"
        "litellm_settings: {telemetry: false, drop_params: true}\n"
    )
    return [
        program,
        "--config",
        str(path),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--num_workers",
        "1",
    ]


@dataclass
class Proxy:
    name: str
    port: int
    process: subprocess.Popen[bytes] | None  # None: the mock itself
    rates: list[float] = field(default_factory=list)
    user_ms: list[float] = field(default_factory=list)
    system_ms: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)


def cpu_seconds(pid: int) -> tuple[float, float]:
    """User and system time of a process and of those that it started."""
    user = system = 0.0
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        user, system = int(fields[11]) / TICK, int(fields[12]) / TICK
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                for child in file.read().split():
                    more = cpu_seconds(int(child))
                    user, system = user + more[0], system + more[1]
    except FileNotFoundError:
        pass
    return user, system


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    quiet = {"LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR",
             "LITELLM_TELEMETRY": "False", "NO_PROXY": "*"}  # fmt: skip
    with log.open("wb") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **quiet}, start_new_session=True
        )


def wait_for(
    port: int, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 120.0
) -> None:
    ask, end = request_bytes(False, False), time.monotonic() + timeout_s
    while True:
        try:
            uvloop.run(load(port, ask, False, 1, 0.0))
            return
        except (OSError, RuntimeError, TimeoutError) as error:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{error}\n{log.read_text(errors='replace')[-2000:]}") from None
            time.sleep(0.3)


def stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def measure(proxy: Proxy, ask: bytes, args: argparse.Namespace) -> None:
    pid = None if proxy.process is None else proxy.process.pid
    uvloop.run(load(proxy.port, ask, args.stream, args.clients, 0.3))
    before = (0.0, 0.0) if pid is None else cpu_seconds(pid)
    took, whole_s = uvloop.run(load(proxy.port, ask, args.stream, args.clients, args.seconds))
    after = before if pid is None else cpu_seconds(pid)
    took.sort()
    proxy.rates.append(len(took) / whole_s)
    proxy.user_ms.append(1e3 * (after[0] - before[0]) / len(took))
    proxy.system_ms.append(1e3 * (after[1] - before[1]) / len(took))
    proxy.p50.append(1e3 * took[len(took) // 2])
    proxy.p99.append(1e3 * took[min(len(took) - 1, len(took) * 99 // 100)])


NAMES = ("rates", "user_ms", "system_ms", "p50", "p99")


def table(proxies: Sequence[Proxy], missing: Mapping[str, str]) -> list[str]:
    ours = next((proxy for proxy in proxies if proxy.name == "penstock"), None)
    lines = [
        f"{'proxy':15}{'per s':>7}{'user':>8}{'system':>8}{'p50':>9}{'p99 ms':>9}  ours over it"
    ]
    for proxy in proxies:
        rate, user, system, p50, p99 = (statistics.median(getattr(proxy, name)) for name in NAMES)
        ratio = ""
        if ours is not None and proxy is not ours:
            each = sorted(a / b for a, b in zip(ours.rates, proxy.rates, strict=True))
            ratio = f"{statistics.median(each):.2f}x [{each[0]:.2f}..{each[-1]:.2f}]"
        cpu = f"{'-':>8}{'-':>8}" if proxy.process is None else f"{user:8.2f}{system:8.2f}"
        lines.append(f"{proxy.name:15}{rate:7.0f}{cpu}{p50:9.1f}{p99:9.1f}  {ratio}")
    lines += [f"{name:15} not run: {why}" for name, why in missing.items()]
    return [*lines, "user, system: milliseconds of CPU an answer"]


def run(args: argparse.Namespace, scratch: Path) -> tuple[list[Proxy], dict[str, str]]:
    names = ["penstock", *PEERS] if args.only is None else args.only.split(",")
    programs = {name: "" if name == "penstock" else found(name, args.peers) for name in names}
    lacking = [name for name, program in programs.items() if program is None]
    missing = dict.fromkeys(lacking, "no such command on PATH or in --peers")
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.gateway", "--mock", str(port)]
    started = [start(command, scratch / "mock.log")]
    proxies: list[Proxy] = []
    try:
        wait_for(port, started[0], scratch / "mock.log")
        if not args.no_mock:
            proxies.append(Proxy("no proxy", port, None))
        for name, program in programs.items():
            if program is None:
                continue
            at, log = free_port(), scratch / f"{name}.log"
            told = command_of(name, program, at, f"http://127.0.0.1:{port}", scratch)
            started.append(start(told, log))
            try:
                wait_for(at, started[-1], log)
            except RuntimeError as error:
                missing[name] = f"it did not start: {str(error).strip().splitlines()[-1]}"
                continue
            proxies.append(Proxy(name, at, started[-1]))
        ask = request_bytes(args.stream, args.paced)
        for _ in range(args.rounds):
            for proxy in proxies:
                measure(proxy, ask, args)
    finally:
        for process in reversed(started):
            stop(process)
    return proxies, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--peers", type=Path, help="folder of virtual environments")
    parser.add_argument("--only", help="names, with commas")
    parser.add_argument("--paced", action="store_true", help="an event every two milliseconds")
    parser.add_argument(
        "--whole", dest="stream", action="store_false", help="no streams, one JSON body"
    )
    parser.add_argument("--no-mock", action="store_true", help="leave out the line without a proxy")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--mock", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mock is not None:
        import uvicorn

        uvicorn.run(
            mock, port=args.mock, log_level="error", loop="uvloop", lifespan="off", access_log=False
        )
        return
    with tempfile.TemporaryDirectory() as scratch:
        proxies, missing = run(args, Path(scratch))
    kind = "whole answers" if not args.stream else "streams, paced" if args.paced else "streams"
    print(
        f"{kind} of {TOKENS} tokens, {args.clients} clients, {args.rounds} rounds of {args.seconds:g} s"
    )
    print("\n".join(table(proxies, missing)))
    if args.json is not None:
        rows = [{name: getattr(proxy, name) for name in ("name", *NAMES)} for proxy in proxies]
        args.json.write_text(json.dumps({"rows": rows, "missing": missing}, indent=1))


if __name__ == "__main__":
    main()
