"""What a long prompt does to those who are being answered: in one lane, in chunks, and in two lanes by their cores.

    python benchmarks/lanes.py [--model FOLDER] [--prompt 1024] [--answers 4] [--rounds 3] [--minutes 4] [--json FILE]

A replica on the real engine writes some answers; then one prompt arrives. Measured are the gaps between the tokens of
the answers before it arrives and while it is computed, and how long its first token takes. Settings take turns, so
that other work on the machine falls on all of them; medians of rounds are shown, with the lowest and highest. Without
--model it is a random Llama of 25 M parameters. No round is begun after so many minutes, and a trial that takes more
than one is given up and said so: two lanes that share cores with other work may starve each other.

    whole        one lane, the prompt in one step of its own (SGLang's order)
    chunk N      one lane, N tokens a step, answers and prompt together (vLLM's)
    lanes p/d    two lanes (semi-PD), p cores for the prompt and d for the answers; 2/1 and so on let them meet on cores

Core counts are of a machine with two. Times are those of the clock: on a busy machine they are worth little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from random_models import save_random_llama
from step_overhead import SHAPE

from penstock.core.events import Event
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.torch.open import EngineConfig, open_executor
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy import find

CORES = 2
LONGEST_S = 60.0  # of a trial
BEFORE = 20  # tokens of each answer before the prompt arrives
SPLITS = {"1/1": (0.5, 0.5), "2/1": (1.0, 0.5), "1/2": (0.5, 1.0), "2/2": (1.0, 1.0)}
Row = dict[str, Any]


class Nothing:
    """Policies here ask for no predictions."""

    def predict(self, chunks: object, share: float = 1.0) -> float:
        return 1.0

    def quantile(self, job: object, q: float) -> int:
        return 1

    def sample(self, job: object, u: float) -> int:
        return 1

    def emit(self, event: Event) -> None:
        pass


def settings(chunks: Sequence[int]) -> dict[str, tuple[int, Any]]:
    """Lanes and batch policy by name."""
    found: dict[str, tuple[int, Any]] = {"whole": (1, lambda: find("batch", "sglang")())}
    for size in chunks:
        found[f"chunk {size}"] = (
            1,
            lambda size=size: find("batch", "vllm-v1")(max_tokens=size),
        )
    for name, (prefill, decode) in SPLITS.items():
        found[f"lanes {name}"] = (
            2,
            lambda p=prefill, d=decode: find("batch", "semi-pd")(
                prefill_share=p, decode_share=d, is_elastic=False
            ),
        )
    return found


class Trial:
    """One prompt among answers."""

    def __init__(self, executor: Any, batch: Any, args: argparse.Namespace) -> None:
        self._args = args
        self._told: dict[str, list[float]] = {}
        nobody = Nothing()
        self.replica = Replica(
            ReplicaConfig(num_blocks=executor.num_blocks, has_prefix_cache=False),
            executor,
            ReplicaPolicies(
                order=find("order", "fcfs")(),
                admit=find("admit", "full-fit")(),
                batch=batch,
                evict=find("evict", "retract")(),
                blocks=find("evict", "lru")(),
            ),
            Predictors(cost=nobody, lengths=nobody),
            log=nobody,
            on_outputs=self._hear,
        )

    def _hear(self, outputs: tuple[tuple[str, Output], ...]) -> None:
        at = asyncio.get_running_loop().time()
        for name, output in outputs:
            self._told.setdefault(name, []).extend([at] * output.num_tokens)

    def _ask(self, name: str, size: int, tokens: int) -> None:
        ids = [3 + (7 * at + 13 * size) % 900 for at in range(size)]
        sampling = Sampling(temperature=0.0, ignore_eos=True, max_tokens=tokens)
        self.replica.submit(
            Request(id=RequestId(name), model="m", prompt=TokenPrompt(ids), sampling=sampling)
        )

    async def _until(self, name: str, tokens: int) -> None:
        while len(self._told.get(name, ())) < tokens:
            await asyncio.sleep(0.001)

    async def run(self) -> Row:
        names = [f"answer {at}" for at in range(self._args.answers)]
        for at, name in enumerate(names):
            self._ask(name, 32 + at, 4000)
        await self._until(names[-1], BEFORE)
        began = asyncio.get_running_loop().time()
        self._ask("prompt", self._args.prompt, 1)
        await self._until("prompt", 1)
        (first,) = self._told["prompt"]
        for name in names:
            self.replica.cancel(name)
        await self.replica.drain()
        times = self._told[names[0]]
        gaps = [(end, end - start) for start, end in zip(times, times[1:], strict=False)]
        before = [gap for end, gap in gaps if end <= began][2:]
        beside = [gap for end, gap in gaps if began < end <= first]
        beside.append(first - max([began, *(end for end, _ in gaps if end <= first)]))
        return {
            "before_ms": 1e3 * statistics.median(before),
            "gap_ms": 1e3 * statistics.median(beside),
            "longest_ms": 1e3 * max(beside),
            "first_s": first - began,
        }


async def measure(args: argparse.Namespace) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    loop = asyncio.get_running_loop()
    end = loop.time() + 60 * args.minutes
    for number in range(args.rounds):
        for name, (lanes, make) in settings(args.chunks).items():
            if loop.time() > end:
                return found
            config = EngineConfig(
                device="cpu", threads=CORES, lanes=lanes, num_blocks=args.prompt // 16 + 1024
            )
            executor = open_executor(args.model, config)
            trial = Trial(executor, make(), args)
            task = asyncio.create_task(trial.replica.run())
            try:
                row = await asyncio.wait_for(trial.run(), LONGEST_S)
                found.setdefault(name, []).append(row)
                print(f"round {number + 1} {name}: {row}", file=sys.stderr, flush=True)
            except TimeoutError:
                print(f"round {number + 1} {name}: given up", file=sys.stderr, flush=True)
            await trial.replica.stop()
            await task
    return found


def show(found: dict[str, list[Row]]) -> None:
    heads = ("gap before, ms", "gap beside, ms", "longest, ms", "first token, s")
    print(f"{'setting':12}" + "".join(f"{head:>24}" for head in heads))
    for name, rows in found.items():
        line = f"{name:12}"
        for key in ("before_ms", "gap_ms", "longest_ms", "first_s"):
            values = [row[key] for row in rows]
            digits = 2 if key == "first_s" else 1
            told = f"{min(values):.{digits}f}..{max(values):.{digits}f}"
            line += f"{statistics.median(values):>10.{digits}f} {told:>13}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--chunks", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        if args.model is None:
            save_random_llama(Path(root), SHAPE)
            args.model = root
        found = asyncio.run(measure(args))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    show(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
