"""How fast the HTTP process answers while the engine decodes on every core.

    python benchmarks/http_under_load.py [--streams 16] [--seconds 20] [--set fleet.0.executor.niceness=0] [--json FILE]

It starts `penstock serve` on a free port with a random model of --millions parameters (the tokenizer is the embedded
model's), keeps --streams streams decoding, and meanwhile asks GET /health every 50 ms and reads the gaps between the
tokens of one more short stream after another. Given are p50 and p99 in milliseconds, and the tokens a second of all the
streams. `--set` (any number of times) goes to the server, `--twice A` runs without and with a setting in turns, so that
what else the machine does meets both. `--idle` asks before the load begins.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import aiohttp
from random_models import save_random_llama

from penstock.engine.folder import DEFAULT_FOLDER

SHAPES = {
    25: dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=9),
    100: dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=11),
    400: dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24),
}
FILES = ("tokenizer.json", "tokenizer_config.json")
PROBE_S = 0.05


@dataclass
class Seen:
    """Milliseconds of each probe, and tokens of the load."""

    health: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    num_tokens: int = 0


def save_model(folder: Path, millions: int) -> None:
    shape = SHAPES[millions] | dict(head_dim=64, vocab_size=4096)
    heads = shape["hidden_size"] // 64
    save_random_llama(
        folder, shape | dict(num_attention_heads=heads, num_key_value_heads=heads // 2)
    )
    for name in FILES:
        shutil.copy(DEFAULT_FOLDER / name, folder / name)


def body(seq: int, tokens: int) -> dict[str, object]:
    prompt = [(7 * seq + at) % 4000 + 10 for at in range(64)]
    ends = dict(max_tokens=tokens, ignore_eos=True, temperature=0)
    return dict(model="load", prompt=prompt, stream=True, **ends)


async def stream(http: aiohttp.ClientSession, asked: dict[str, object], seen: Seen) -> list[float]:
    """Instants of the stream's tokens, also counted in `seen` as they come."""
    heard: list[float] = []
    async with http.post("/v1/completions", json=asked) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            heard.append(time.perf_counter())
            seen.num_tokens += 1
    return heard


async def keep_busy(http: aiohttp.ClientSession, seq: int, seen: Seen) -> None:
    while True:
        await stream(http, body(seq, 256), seen)


async def probe_health(http: aiohttp.ClientSession, seen: Seen, until: float) -> None:
    while time.perf_counter() < until:
        begin = time.perf_counter()
        async with http.get("/health") as answer:
            await answer.read()
        seen.health.append(1e3 * (time.perf_counter() - begin))
        await asyncio.sleep(PROBE_S)


async def probe_stream(http: aiohttp.ClientSession, seen: Seen, until: float) -> None:
    seq = 100_000
    while time.perf_counter() < until:
        seq += 1
        heard = await stream(http, body(seq, 16), seen)
        seen.gaps += [1e3 * (b - a) for a, b in pairwise(heard)]


async def up(http: aiohttp.ClientSession, server: subprocess.Popen[bytes]) -> None:
    for _ in range(1500):
        if server.poll() is not None:
            sys.exit(f"the server ended with code {server.returncode}")
        try:
            async with http.get("/health") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.2)
    sys.exit("the server did not come up")


async def measure(url: str, args: argparse.Namespace, server: subprocess.Popen[bytes]) -> Seen:
    seen, connector = Seen(), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as http:
        await up(http, server)
        load = [] if args.idle else [keep_busy(http, seq, seen) for seq in range(args.streams)]
        tasks = [asyncio.create_task(one) for one in load]
        await asyncio.sleep(3)
        seen.num_tokens, until = 0, time.perf_counter() + args.seconds
        await asyncio.gather(probe_health(http, seen, until), probe_stream(http, seen, until))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return seen


def run(folder: Path, args: argparse.Namespace, sets: list[str]) -> dict[str, object]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = ["--set", "fleet.0.name=load", "--set", "fleet.0.executor.dtype=bf16"]
    for one in sets:
        told += ["--set", one]
    command = [sys.executable, "-m", "penstock", "serve", str(folder), "--port", str(port), *told]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        seen = asyncio.run(measure(f"http://127.0.0.1:{port}", args, server))
    finally:
        server.send_signal(signal.SIGINT)
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
    row: dict[str, object] = {"sets": sets, "tokens_per_s": seen.num_tokens / args.seconds}
    for name, values in (("health", seen.health), ("gap", seen.gaps)):
        values.sort()
        row |= {
            f"{name}_p50": values[len(values) // 2],
            f"{name}_p99": values[len(values) * 99 // 100],
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--millions", type=int, choices=SHAPES, default=100)
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--twice", metavar="SETTING", help="run without it and with it, in turns")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--idle", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as root:
        save_model(Path(root), args.millions)
        for _ in range(args.rounds):
            for more in [[], [args.twice]] if args.twice else [[]]:
                rows.append(run(Path(root), args, args.sets + more))
                row = rows[-1]
                told = "  ".join(f"{k} {v:8.2f}" for k, v in row.items() if isinstance(v, float))
                print(f"{told}  {' '.join(args.sets + more)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
