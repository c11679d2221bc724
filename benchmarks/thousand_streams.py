"""A thousand streams at once against one server: nothing lost, nothing doubled, memory back afterwards.

    python benchmarks/thousand_streams.py [--streams 1000] [--tokens 32] [--url http://127.0.0.1:8000]

Without --url it starts `penstock serve` itself on a free port. Every stream asks for one of 16 prompts, greedily and
past the end of text, so each must yield exactly --tokens tokens and the very text that the same prompt got when asked
alone, not streamed. Afterwards all blocks must be free (from /metrics) and the resident memory of the server's
processes is read again, twice, around a second wave: what grows from wave to wave is a leak.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

import aiohttp

PROMPTS = [f"def f{number}(x):\n    return x" for number in range(16)]


@dataclass
class Heard:
    text: str = ""
    num_tokens: int | None = None
    num_events: int = 0
    ends: int = 0


def family(pid: int) -> list[int]:
    """The process and its descendants, from /proc."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def resident_mib(pid: int) -> dict[int, float]:
    page = os.sysconf("SC_PAGE_SIZE")
    read = {}
    for one in family(pid):
        with open(f"/proc/{one}/statm") as file:
            read[one] = int(file.read().split()[1]) * page / 2**20
    return read


def body(prompt: str, tokens: int, **more: object) -> dict[str, object]:
    return {
        "model": "default",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


async def alone(http: aiohttp.ClientSession, prompt: str, tokens: int) -> str:
    async with http.post("/v1/completions", json=body(prompt, tokens)) as answer:
        answer.raise_for_status()
        return str((await answer.json())["choices"][0]["text"])


async def stream(http: aiohttp.ClientSession, prompt: str, tokens: int) -> Heard:
    heard = Heard()
    asked = body(prompt, tokens, stream=True, stream_options={"include_usage": True})
    async with http.post("/v1/completions", json=asked) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                heard.ends += 1
                continue
            event = json.loads(line[6:])
            heard.num_events += 1
            for choice in event.get("choices", ()):
                heard.text += choice.get("text") or ""
            if event.get("usage"):
                heard.num_tokens = event["usage"]["completion_tokens"]
    return heard


async def wave(
    http: aiohttp.ClientSession, streams: int, tokens: int, expected: dict[str, str]
) -> dict[str, float]:
    began = time.perf_counter()
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(streams)]
    heard = await asyncio.gather(
        *(stream(http, prompt, tokens) for prompt in prompts), return_exceptions=True
    )
    wall_s = time.perf_counter() - began
    failed = [one for one in heard if isinstance(one, BaseException)]
    good = [
        (prompt, one) for prompt, one in zip(prompts, heard, strict=True) if isinstance(one, Heard)
    ]
    return {
        "streams": streams,
        "wall_s": round(wall_s, 2),
        "failed": len(failed),
        "not_ended_once": sum(one.ends != 1 for _, one in good),
        "wrong_number_of_tokens": sum(one.num_tokens != tokens for _, one in good),
        "text_differs": sum(one.text != expected[prompt] for prompt, one in good),
        "tokens_per_s": round(sum(one.num_tokens or 0 for _, one in good) / wall_s, 1),
    }


async def metric(http: aiohttp.ClientSession, ending: str) -> float | None:
    async with http.get("/metrics") as answer:
        for line in (await answer.text()).splitlines():
            if not line.startswith("#") and line.split("{")[0].endswith(ending):
                return float(line.rpartition(" ")[2])
    return None


async def wait_until_up(
    http: aiohttp.ClientSession, server: subprocess.Popen[bytes] | None
) -> None:
    for _ in range(600):
        if server is not None and server.poll() is not None:
            sys.exit(f"the server ended with code {server.returncode}")
        try:
            async with http.get("/health") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.2)
    sys.exit("the server did not come up within two minutes")


async def measure(
    url: str, arguments: argparse.Namespace, server: subprocess.Popen[bytes] | None
) -> bool:
    unlimited = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=1800)
    async with aiohttp.ClientSession(url, connector=unlimited, timeout=timeout) as http:
        await wait_until_up(http, server)
        expected = {prompt: await alone(http, prompt, arguments.tokens) for prompt in PROMPTS}
        report: dict[str, object] = {"waves": []}
        memory = []
        waves = []
        for _ in range(arguments.waves):
            waves.append(await wave(http, arguments.streams, arguments.tokens, expected))
            await asyncio.sleep(2)
            if server is not None:
                memory.append(
                    {str(pid): round(mib) for pid, mib in resident_mib(server.pid).items()}
                )
        report["waves"], report["resident_mib_after_each_wave"] = waves, memory
        report["running_afterwards"] = await metric(http, "num_requests_running")
        report["kv_cache_usage_afterwards"] = await metric(http, "kv_cache_usage_perc")
        print(json.dumps(report, indent=2))
        wrong = ("failed", "not_ended_once", "wrong_number_of_tokens", "text_differs")
        return not any(one[name] for one in waves for name in wrong)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--url")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--waves", type=int, default=3)
    arguments = parser.parse_args()
    server, url = None, arguments.url
    if url is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        server = subprocess.Popen([sys.executable, "-m", "penstock", "serve", "--port", str(port)])
    try:
        good = asyncio.run(measure(url, arguments, server))
    finally:
        if server is not None:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
