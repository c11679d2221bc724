"""How long a request stands still when it moves between two engine processes, beside its decode step.

    python -m benchmarks.migration_pause                       # about four minutes on two quiet cores
    python -m benchmarks.migration_pause --contexts 256,2048 --tries 3
    python -m benchmarks.migration_pause --device cuda --shape 8b --contexts 2048,7000     # on one card, in bf16

Two replicas of a random Llama (SHAPE) with one thread each and without a prefix cache, so that every movement copies
all blocks. One request with a prompt of each length decodes, alone, and is moved to and fro in each way in turn. Its
step is the median of the gaps between its last tokens before a movement is asked for; the longest gap from there until
the second token behind the movement is what its caller waits.

    live        copied in stages while it decodes; the last, at most 16 blocks, while it stands still
    blocking    stopped, copied whole, taken in: stop-and-copy
    queued      stopped, and computed again at the target, which knows nothing of its prompt: recompute, once a length

Printed: the median gap in milliseconds, and in steps the median and the range of all tries; and the longest context's
gap over the shortest's.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

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
QWEN = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
SHAPES = {
    "small": SHAPE,
    "0.6b": dict(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, **QWEN
    ),
    "8b": dict(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, **QWEN
    ),
}  # fmt: skip
BEFORE, AFTER = 24, 2  # tokens before a movement is asked for, and behind it
LONGEST = 8192


class Gap(NamedTuple):
    """Around one movement, in seconds."""

    longest: float
    step: float


class Wanderer:
    """One request that is moved again and again, by each of `modes` in turn."""

    def __init__(self, fleet: Fleet, context: int, modes: list[MoveMode], number: int) -> None:
        self._fleet, self._modes = fleet, list(modes)
        chance = random.Random(number)
        num_output = len(modes) * 4 * BEFORE
        ids = [chance.randrange(1, 4096) for _ in range(min(context, LONGEST - num_output))]
        self.request = Request(
            id=RequestId(f"r{number}"),
            model=fleet.name,
            prompt=TokenPrompt(ids),
            sampling=Sampling(max_tokens=num_output, temperature=0.0, ignore_eos=True),
        )
        self._heard_at: list[float] = []
        self._asked: int | None = None  # tokens heard by then
        self._over: int | None = None
        self._next = BEFORE
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gaps: dict[MoveMode, list[Gap]] = {mode: [] for mode in MODES}

    async def measure(self) -> None:
        serving = asyncio.ensure_future(self._fleet.submit(self.request, self._hear))
        await asyncio.wait((serving, self._done), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
            raise SystemExit(f"the answer ended before {self._modes} came to their turn")
        serving.cancel()
        await asyncio.wait((serving,))
        self._done.result()

    def _hear(self, output: Output) -> None:
        self._heard_at.append(time.perf_counter())
        count = len(self._heard_at)
        if self._asked is None and count >= self._next and self._modes:
            self._asked = count
            self._fleet.move(self.request.id, self._other(), self._modes[0], on_over=self._settle)
        elif self._over is not None and count >= self._over + AFTER:
            self._note()

    def _other(self) -> str:
        here = self._fleet.holders()[self.request.id]
        return next(each.replica for each in self._fleet.reports() if each.replica != here)

    def _settle(self, told: Migrated) -> None:
        if told.outcome == "committed":
            self._over = len(self._heard_at)
        elif not self._done.done():
            self._done.set_exception(SystemExit(f"it did not move: {told.outcome}, {told.why}"))

    def _note(self) -> None:
        assert self._asked is not None
        at = self._heard_at
        before, around = at[self._asked - BEFORE : self._asked], at[self._asked - 1 :]
        gap = Gap(max(_between(around)), statistics.median(_between(before)))
        self.gaps[self._modes.pop(0)].append(gap)
        self._asked = self._over = None
        self._next = len(at) + BEFORE
        if not self._modes and not self._done.done():
            self._done.set_result(None)


def _between(at: list[float]) -> list[float]:
    return [later - one for one, later in zip(at, at[1:], strict=False)]


async def run(contexts: list[int], tries: int, device: str, shape: dict[str, int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        is_card = device != "cpu"
        save_random_llama(Path(name), shape, is_tied=True, is_repeated=True)
        sets = ["fleet.0.replicas=2", f'fleet.0.executor.device="{device}"']
        sets += ['fleet.0.executor.dtype="bf16"' if is_card else "fleet.0.executor.threads=1"]
        sets += ["fleet.0.cache.num_blocks=700", "fleet.0.cache.prefix=false"]
        sets += ['fleet.0.policy.route="least"']
        config = load_config(model=name, sets=sets)
        leaves, _ = process_leaves(config)
        service = await assemble(config, leaves)
        try:
            await _table(service.fleet(service.models()[0]), contexts, tries)
        finally:
            await service.stop()


async def _table(fleet: Fleet, contexts: list[int], tries: int) -> None:
    medians = dict[tuple[int, MoveMode], float]()
    await Wanderer(fleet, 64, [*MODES], -1).measure()  # for nothing: memory is mapped, kernels warm
    print(
        f"{'context':>7}{'step ms':>9}"
        + "".join(f"{f'{mode} ms':>13}{'steps':>18}" for mode in MODES)
    )
    for number, context in enumerate(contexts):
        moved = Wanderer(fleet, context, [*MODES[:2]] * tries + ["queued"], number)
        await moved.measure()
        steps = [gap.step for gaps in moved.gaps.values() for gap in gaps]
        line = f"{context:7d}{statistics.median(steps) * 1e3:9.2f}"
        for mode, gaps in moved.gaps.items():
            longest = medians[context, mode] = statistics.median([gap.longest for gap in gaps])
            line += f"{longest * 1e3:13.2f}{_steps(gaps):>18}"
        print(line, flush=True)
    ratios = [medians[contexts[-1], mode] / medians[contexts[0], mode] for mode in MODES]
    print("longest/shortest" + "".join(f"{ratio:13.1f}{'':18}" for ratio in ratios))


def _steps(gaps: list[Gap]) -> str:
    told = sorted(gap.longest / gap.step for gap in gaps)
    middle = statistics.median(told)
    return f"{middle:.1f}" if len(told) == 1 else f"{middle:.1f} [{told[0]:.1f}..{told[-1]:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--contexts", default="256,1024,2048,4096,8192")
    parser.add_argument("--tries", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="Qwen3's, but the first")
    told = parser.parse_args()
    contexts = [int(each) for each in told.contexts.split(",")]
    asyncio.run(run(contexts, told.tries, told.device, SHAPES[told.shape]))


if __name__ == "__main__":
    main()
