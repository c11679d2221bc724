"""What callers lose when things break: real processes, real signals, real sockets; prints a table.

    python -m benchmarks.real_faults                    # all faults, three tries each: a few minutes
    python -m benchmarks.real_faults --only kill,stop --tries 1
    python -m benchmarks.real_faults --json faults.json

A server of two replicas of the default model answers STREAMS callers that stream greedy texts of TOKENS tokens; when
all of them have heard something the fault comes. Every caller is put into one column:

    whole      all tokens came, once, and the text is the one that a quiet server wrote
    other      as many tokens, other words (two batch shapes may part where two tokens are equally likely)
    told       the stream, or the answer, ended with an error that says so
    cut        the connection broke, which any client library raises
    lost       it ended as if all were well and is not whole, or never ended
    doubled    more came than was asked for, or something twice

`well after` is the time until two replicas are alive again and hold no block. Faults:

    kill       SIGKILL to one replica           stop     SIGSTOP to one replica, for good
    pause      SIGSTOP for two seconds          deaf     a caller that never reads what it asked for (8 x megabytes)
    disk       the event log cannot be written  gateway  SIGKILL to the gateway, and another one on the same port
    outlived   as `gateway`, with replicas that outlive it (serve.outlive), which the other one takes over
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

STREAMS, TOKENS = 6, 300
PATIENCE_S = 60.0
COLUMNS = ("whole", "other", "told", "cut", "lost", "doubled")
ROOT = Path(__file__).parent.parent
SMALL_LOG_BYTES = 2000


def body(number: int, tokens: int = TOKENS) -> dict[str, Any]:
    return {
        "model": "default",
        "prompt": f"def function_{number}(",
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@dataclass
class Server:
    process: asyncio.subprocess.Process
    url: str
    said: list[str] = field(default_factory=list)

    def engines(self) -> list[int]:
        """Process ids of the replicas."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [pid for pid in map(int, children.split()) if "worker" in command_of(pid)]

    async def state(self) -> dict[str, Any]:
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/internal/state") as told:
            found: dict[str, Any] = await told.json()
            return found

    async def is_well(self) -> bool:
        """Two replicas are alive and nothing is held anywhere."""
        try:
            replicas = (await self.state())["replicas"]
        except aiohttp.ClientError:
            return False
        return len(replicas) == 2 and all(
            each["is_alive"]
            and not each.get("is_suspect")
            and not each["num_running"] + each["num_waiting"]
            and each["free_blocks"] == each["total_blocks"]
            for each in replicas
        )


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@contextlib.asynccontextmanager
async def serving(
    *args: str, port: int = 0, file_bytes: int | None = None
) -> AsyncIterator[Server]:
    """`file_bytes`: no file may grow beyond, as on a disk that is full."""

    def limit() -> None:
        if file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "penstock", "serve", "--device", "cpu", "--replicas", "2", "--port", str(port),
        "--set", "fleet.0.cache.num_blocks=4096", *args,
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, preexec_fn=limit,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    said: list[str] = []
    reader = asyncio.create_task(read(process.stderr, said))
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 120)).decode()
        found = re.search(r"http://[\d.:]+", line)
        assert found, f"the server did not start: {said}"
        yield Server(process, found[0], said)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 20)
            except TimeoutError:
                process.kill()
        reader.cancel()


async def read(stream: asyncio.StreamReader, said: list[str]) -> None:
    async for line in stream:
        said.append(line.decode(errors="replace").rstrip())


@dataclass
class Heard:
    """What one caller got."""

    text: str = ""
    num_tokens: int | None = None
    is_done: bool = False
    is_cut: bool = False
    error: str = ""


async def call(url: str, number: int, heard: Heard) -> None:
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as http,
            http.post(f"{url}/v1/completions", json=body(number)) as answer,
        ):
            if answer.status != 200:
                heard.error = f"status {answer.status}"
                return
            async for line in answer.content:
                take(line.decode().strip(), heard)
    except TimeoutError:
        pass  # lost
    except (aiohttp.ClientError, OSError):
        heard.is_cut = True


def take(line: str, heard: Heard) -> None:
    if line == "data: [DONE]":
        heard.is_done = True
    elif line.startswith("data: "):
        told = json.loads(line[6:])
        if "error" in told:
            heard.error = told["error"]["message"]
            return
        for choice in told.get("choices", ()):
            heard.text += choice["text"]
        if told.get("usage"):
            heard.num_tokens = told["usage"]["completion_tokens"]


def column(heard: Heard, expected: str) -> str:
    if heard.error:
        return "told"
    if heard.is_cut:
        return "cut"
    if not heard.is_done or heard.num_tokens is None:
        return "lost"
    if heard.num_tokens != TOKENS or len(heard.text) > 2 * len(expected):
        return (
            "doubled"
            if heard.num_tokens > TOKENS or len(heard.text) > 2 * len(expected)
            else "lost"
        )
    return "whole" if heard.text == expected else "other"


async def ask_all(server: Server) -> tuple[list[Heard], list[asyncio.Task[None]]]:
    heard = [Heard() for _ in range(STREAMS)]
    tasks = [asyncio.create_task(call(server.url, at, each)) for at, each in enumerate(heard)]
    end = time.monotonic() + PATIENCE_S
    while not all(each.text for each in heard) and time.monotonic() < end:
        await asyncio.sleep(0.02)
    return heard, tasks


Fault = Callable[[Server], Awaitable[None]]


async def kill(server: Server) -> None:
    os.kill(server.engines()[0], signal.SIGKILL)


async def stop(server: Server) -> None:
    os.kill(server.engines()[0], signal.SIGSTOP)


async def pause(server: Server) -> None:
    pid = server.engines()[0]
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(2.0)
    os.kill(pid, signal.SIGCONT)


async def deaf(server: Server) -> None:
    """Eight requests for megabytes on sockets with small buffers, none of which is ever read."""
    host, port = server.url.removeprefix("http://").split(":")
    for number in range(8):
        caller = socket.socket()
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        caller.connect((host, int(port)))
        told = json.dumps({**body(100 + number, 1500), "n": 4, "logprobs": 20}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(told)}\r\n\r\n"
        )
        caller.sendall(head.encode() + told)
        deaf_sockets.append(caller)


deaf_sockets: list[socket.socket] = []


async def nothing(server: Server) -> None:
    """The fault is there from the start."""


FAULTS: dict[str, Fault] = {
    "kill": kill,
    "stop": stop,
    "pause": pause,
    "deaf": deaf,
    "disk": nothing,
}


GATEWAY = ("gateway", "outlived")


async def one_try(name: str, expected: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        is_full = name == "disk"
        args = ("--log", folder) if is_full else ("--set", "gateway.stall_timeout_s=5")
        async with serving(*args, file_bytes=SMALL_LOG_BYTES if is_full else None) as server:
            heard, tasks = await ask_all(server)
            await FAULTS[name](server)
            began = time.monotonic()
            await asyncio.wait(tasks)
            well = await until_well(server, began)
            for caller in deaf_sockets:
                caller.close()
            deaf_sockets.clear()
    return counted(heard, expected, well)


def counted(heard: list[Heard], expected: list[str], well: float | None) -> dict[str, Any]:
    columns = Counter(column(each, text) for each, text in zip(heard, expected, strict=True))
    return {
        **{name: columns[name] for name in COLUMNS},
        "well_s": well,
        "told_what": sorted({h.error for h in heard if h.error}),
    }


async def until_well(server: Server, began: float) -> float | None:
    while time.monotonic() < began + PATIENCE_S:
        if await server.is_well():
            return time.monotonic() - began
        await asyncio.sleep(0.1)
    return None


async def gateway_try(expected: list[str], *, outlives: bool) -> dict[str, Any]:
    """The gateway dies: its replicas must end with it, or not, and another one must be able to take its place."""
    with tempfile.TemporaryDirectory() as folder:
        args: tuple[str, ...] = ()
        if outlives:
            args = ("--set", "serve.outlive.name=faults", "--set", f"serve.outlive.folder={folder}")
        async with serving(*args) as server:
            heard, tasks = await ask_all(server)
            engines, port = server.engines(), int(server.url.rpartition(":")[2])
            began = time.monotonic()
            server.process.kill()
            await asyncio.wait(tasks)
            while not outlives and any(map(is_running, engines)):
                assert time.monotonic() < began + PATIENCE_S, "a replica outlived its gateway"
                await asyncio.sleep(0.02)
            async with serving(*args, port=port) as second:
                well = await until_well(second, began)
                assert not outlives or not second.engines(), "a replica was not taken over"
                second.process.send_signal(signal.SIGTERM)
                await second.process.wait()
            return counted(heard, expected, well)


async def texts() -> list[str]:
    """What a quiet server writes."""
    async with serving() as server:
        found = [Heard() for _ in range(STREAMS)]
        for number, heard in enumerate(found):
            await call(server.url, number, heard)
        assert all(column(each, each.text) == "whole" for each in found), found
        return [each.text for each in found]


async def measure(names: list[str], tries: int) -> dict[str, list[dict[str, Any]]]:
    expected = await texts()
    found: dict[str, list[dict[str, Any]]] = {}
    print(f"{'fault':9} tries {'  '.join(f'{name:>7}' for name in COLUMNS)}  well after")
    for name in names:
        runs = found[name] = []
        for _ in range(tries):
            if name in GATEWAY:
                runs.append(await gateway_try(expected, outlives=name == "outlived"))
            else:
                runs.append(await one_try(name, expected))
        sums = "  ".join(f"{sum(each[which] for each in runs):7d}" for which in COLUMNS)
        wells = [each["well_s"] for each in runs]
        well = "NEVER" if None in wells else f"{min(wells):.1f} - {max(wells):.1f} s"
        print(f"{name:9} {tries:5d} {sums}  {well}", flush=True)
        for told in sorted({told for each in runs for told in each["told_what"]}):
            print(f"{'':15} told: {told}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--only", default=",".join((*FAULTS, *GATEWAY)), help="faults, by comma")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    told = parser.parse_args()
    names = told.only.split(",")
    unknown = set(names) - {*FAULTS, *GATEWAY}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    found = asyncio.run(measure(names, told.tries))
    if told.json is not None:
        told.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
