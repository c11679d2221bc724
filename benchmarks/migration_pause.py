"""How long a request stands still when it moves between two engine processes, beside its decode step.

    python -m benchmarks.migration_pause                       # some minutes on two cores
    python -m benchmarks.migration_pause --contexts 256,2048 --tries 3

Two replicas of a random Llama (SHAPE) with one thread each. A request with a prompt of each length decodes at one of
them, alone, and is moved by each way in turn; the gap between its two tokens around the movement is what its caller
waits, and its step is the median of its gaps before.

    live        copied in stages while it decodes; the last, at most 16 blocks, while it stands still
    blocking    stopped, copied whole, taken in: stop-and-copy
    queued      stopped, and computed again at the target, which knows nothing of its prompt: recompute

Printed: the median gap in milliseconds and in steps, and the longest context's gap over the shortest's.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.random_models import save_random_llama
from penstock.assemble import assemble, process_leaves
from penstock.assemble.config import load_config
from penstock.cluster.fleet import Fleet
from penstock.core.moving import Migrated, MoveMode
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
MODES: tuple[MoveMode, ...] = ("live", "blocking", "queued")
BEFORE, AFTER = 24, 24  # tokens before the movement is asked for, and after
LONGEST = 8192


class Moved:
    """One request that is moved once."""

    def __init__(self, fleet: Fleet, context: int, mode: MoveMode, number: int) -> None:
        self._fleet, self._mode = fleet, mode
        chance = random.Random(number)
        ids = [chance.randrange(1, 4096) for _ in range(min(context, LONGEST - 64))]
        self.request = Request(
            id=RequestId(f"r{number}"),
            model=fleet.name,
            prompt=TokenPrompt(ids),
            sampling=Sampling(max_tokens=BEFORE + AFTER, temperature=0.0, ignore_eos=True),
        )
        self.heard_at: list[float] = []
        self.over: Migrated | None = None

    def hear(self, output: Output) -> None:
        self.heard_at.append(time.perf_counter())
        if len(self.heard_at) == BEFORE:
            where = self._fleet._tickets[self.request.id].replica
            other = next(each.replica for each in self._fleet.reports() if each.replica != where)
            self._fleet.move(self.request.id, other, self._mode, on_over=self._settle)

    def _settle(self, told: Migrated) -> None:
        self.over = told

    async def measure(self) -> tuple[float, float]:
        """The gap and the step, in seconds."""
        await self._fleet.submit(self.request, self.hear)
        assert self.over is not None and self.over.outcome == "committed", self.over
        gaps = [later - at for at, later in zip(self.heard_at, self.heard_at[1:], strict=False)]
        return max(gaps[BEFORE - 1 :]), statistics.median(gaps[: BEFORE - 1])


async def run(contexts: list[int], tries: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        save_random_llama(Path(name), SHAPE, is_tied=True)
        sets = ("fleet.0.replicas=2", "fleet.0.executor.threads=1", "fleet.0.cache.num_blocks=1400")
        config = load_config(model=name, sets=sets)
        leaves, _ = process_leaves(config)
        service = await assemble(config, leaves)
        try:
            await _table(service.fleet(service.models()[0]), contexts, tries)
        finally:
            await service.stop()


async def _table(fleet: Fleet, contexts: list[int], tries: int) -> None:
    number, medians = 0, dict[tuple[int, str], float]()
    for mode in MODES:  # once for nothing: memory is mapped, kernels are warm
        await Moved(fleet, 64, mode, -1 - MODES.index(mode)).measure()
    print("context     step ms" + "".join(f"{mode + ' ms':>14}{'steps':>7}" for mode in MODES))
    for context in contexts:
        found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
        for _ in range(tries):
            for mode in MODES:
                number += 1
                found[mode].append(await Moved(fleet, context, mode, number).measure())
        steps = statistics.median([step for told in found.values() for _, step in told])
        line = f"{context:7d}{steps * 1e3:12.2f}"
        for mode, told in found.items():
            gap = medians[context, mode] = statistics.median([gap for gap, _ in told])
            line += f"{gap * 1e3:14.2f}{statistics.median([g / s for g, s in told]):7.1f}"
        print(line, flush=True)
    ratios = [medians[contexts[-1], mode] / medians[contexts[0], mode] for mode in MODES]
    print("longest/shortest   " + "".join(f"{ratio:14.1f}{'':7}" for ratio in ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--contexts", default="256,1024,2048,4096,8192")
    parser.add_argument("--tries", type=int, default=5)
    told = parser.parse_args()
    asyncio.run(run([int(each) for each in told.contexts.split(",")], told.tries))


if __name__ == "__main__":
    main()
