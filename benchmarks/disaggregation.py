"""What long prompts do to answers that are being written: one engine, two that share the work, two that divide it.

    python -m benchmarks.disaggregation                # some minutes on two cores
    python -m benchmarks.disaggregation --rounds 3 --prompts 8

Streams of short prompts write answers all the while; every two seconds a long prompt comes. The same requests, word for
word, are served by

    one         one engine of two threads, 512 tokens a step (prompts in chunks beside the answers)
    two         two engines of one thread, each of which does both
    divided     two engines of one thread: one computes prompts, the other pulls them and writes the answers

Printed, by round in turns: the 99th percentile and the median of the gaps between tokens of the streams, the long
prompts' time to a first token, and the ratios to `divided`. Engines are a random Llama (SHAPE of migration_pause).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.migration_pause import SHAPE
from benchmarks.random_models import save_random_llama
from penstock.assemble import assemble, process_leaves
from penstock.assemble.config import load_config
from penstock.cluster.fleet import Fleet
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling

WAYS = {
    "one": ("fleet.0.executor.threads=2", "fleet.0.policy.batch.max_tokens=512"),
    "two": ("fleet.0.replicas=2", "fleet.0.executor.threads=1", "fleet.0.policy.route='least'"),
    "divided": (
        "fleet.0.replicas=2",
        "fleet.0.executor.threads=1",
        "fleet.0.roles={prefill = 1, decode = 1}",
        "fleet.0.policy.route='least'",
    ),
}
STREAMS, LONG, ANSWER, EVERY_S = 4, 2000, 400, 2.0


def request(name: str, tokens: int, answer: int) -> Request:
    chance = random.Random(name)
    ids = [chance.randrange(1, 4096) for _ in range(tokens)]
    sampling = Sampling(max_tokens=answer, temperature=0.0, ignore_eos=True)
    return Request(id=RequestId(name), model="shape", prompt=TokenPrompt(ids), sampling=sampling)


async def ask(fleet: Fleet, asked: Request) -> list[float]:
    """Instants: when it was asked, then of every token."""
    instants = [time.perf_counter()]

    def hear(output: Output) -> None:
        instants.extend([time.perf_counter()] * output.num_tokens)

    await fleet.submit(asked, hear)
    return instants


async def measure(folder: Path, way: str, prompts: int, number: int) -> dict[str, float]:
    sets = (
        f"fleet.0.model={str(folder)!r}",
        "fleet.0.name='shape'",
        "fleet.0.cache.num_blocks=2000",
    )
    config = load_config(sets=(*sets, *WAYS[way]))
    leaves, _ = process_leaves(config)
    service = await assemble(config, leaves)
    try:
        fleet = service.fleet("shape")
        await ask(fleet, request("warm", 600, 20))
        streams = [
            asyncio.create_task(ask(fleet, request(f"s{number}-{place}", 40, ANSWER)))
            for place in range(STREAMS)
        ]
        await asyncio.sleep(1.0)
        firsts = []
        for place in range(prompts):
            task = asyncio.create_task(ask(fleet, request(f"l{number}-{place}", LONG, 8)))
            await asyncio.sleep(EVERY_S)
            firsts.append(task)
        asked = [await task for task in firsts]
        gaps = np.concatenate([np.diff(await stream)[1:] for stream in streams])
    finally:
        await service.stop()
    return {
        "gap p99": float(np.percentile(gaps, 99)) * 1e3,
        "gap p50": float(np.percentile(gaps, 50)) * 1e3,
        "first": statistics.median(each[1] - each[0] for each in asked) * 1e3,
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=8)
    told = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random_llama(folder, SHAPE, is_tied=True)
        for number in range(told.rounds):
            for way in WAYS:
                found[way].append(await measure(folder, way, told.prompts, number))
    print(f"{'':10}{'gap p99 ms':>12}{'gap p50 ms':>12}{'first ms':>12}{'p99 / divided':>28}")
    for way, rows in found.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        ratios = [
            row["gap p99"] / best["gap p99"]
            for row, best in zip(rows, found["divided"], strict=True)
        ]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}]"
        print(
            f"{way:10}{middle['gap p99']:>12.1f}{middle['gap p50']:>12.1f}{middle['first']:>12.0f}{spread:>28}"
        )


if __name__ == "__main__":
    asyncio.run(main())
