"""Decoding a long context whose first half lies in another process, beside all of it here, and beside fetching it.

    python -m benchmarks.dist_attention [--contexts 2048,16384,65536] [--steps 30] [--json]

Two engines of one random model, a thread each, in two processes. Ways to make the next token of one request take turns:

    local     all blocks here
    lent      half of them lent, attended over by the creditor: what a fleet with `lends` does
    copied    half of them copied here from the creditor's shared memory before each step
    shipped   the same over TCP between the processes, as replicas do that share no memory

The last two are what a machine without DistAttention would have to do. A copy of shared memory costs no more than
reading it once more and writing it, so `copied` can be at most about 2 times `local` however long the context is, and 4
times a `lent` that splits its reading evenly: only `shipped` says anything about machines with a network between them,
and even that network is the memory of one machine. Times are of the clock on the wall, medians, as two processes work
for one token; a busy machine shows in them. What the words are does not matter to speed: keys and values are random,
and so are the weights.

The last lines are arithmetic: bytes that cross per layer and step for LLaMA2-7B with 128K positions lent, in 16 bits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.random_models import save_random_llama
from penstock.core.plans import Done, Opening, Plan, Work
from penstock.core.ports import Completion
from penstock.core.prompt import TokenPrompt
from penstock.core.types import PlanId, Request, RequestId, Sampling
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.open import EngineConfig, open_executor
from penstock.engine.torch.shared import region_of
from penstock.net.blocks import copy_runs
from penstock.net.kv_shared import opened
from penstock.net.kv_tcp import TcpTransport

SHAPE = dict(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=4096,
)
SIZE = 16
LOAN = 1
WAYS = ("local", "lent", "copied", "shipped")


def open_engine(folder: Path, num_blocks: int) -> TorchExecutor:
    config = EngineConfig(
        device="cpu",
        dtype="fp32",
        threads=1,
        num_blocks=num_blocks,
        shares_kv=True,
        lends=True,
        packed_cache="off",
    )
    executor = open_executor(str(folder), config)
    backend = executor._decoder.attention
    assert backend is not None
    backend.arena.normal_()  # type: ignore[attr-defined]
    return executor


async def be_creditor(folder: Path, count: int) -> None:
    """Say where the blocks are, and keep them until stdin ends."""
    executor = open_engine(folder, count + 1)
    assert executor.sharing is not None and executor.transport is not None
    address = executor.sharing.lend(LOAN, list(range(count + 1)))
    wire = over_tcp(executor)
    told = [address, memory_of(executor), wire.card.address]
    print(json.dumps(told), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await wire.close()
    await executor.stop()


def over_tcp(executor: TorchExecutor) -> TcpTransport:
    backend = executor._decoder.attention
    assert backend is not None
    return TcpTransport(region_of(backend.arena), layout="benchmark", block_size=SIZE)  # type: ignore[attr-defined]


def memory_of(executor: TorchExecutor) -> str:
    """The address of its shared memory."""
    assert executor.transport is not None
    address: str = executor.transport.card.address
    return address


class Home:
    """Steps of two requests that decode: one has all its blocks, the other its first half elsewhere."""

    def __init__(self, executor: TorchExecutor, context: int) -> None:
        self.executor, self.context = executor, context
        self.told: asyncio.Queue[Completion] = asyncio.Queue()
        self.positions: dict[int, int] = {}
        self._plans = 0
        executor.listen(self.told.put_nowait)

    async def begin(self, seq: int, blocks: list[int]) -> None:
        request = Request(
            id=RequestId(str(seq)),
            model="m",
            prompt=TokenPrompt([3] * self.context),
            sampling=Sampling(temperature=0.0, ignore_eos=True),
        )
        self.positions[seq] = self.context - 1
        await self.step(seq, tuple(blocks), (Opening(seq, request, 0),))

    async def step(
        self, seq: int, blocks: tuple[int, ...] = (), opened: tuple[Opening, ...] = ()
    ) -> None:
        self._plans += 1
        at = self.positions[seq]
        work = Work(seq, at, 1, True, blocks, bool(blocks))
        self.executor.launch(Plan(id=PlanId(self._plans), work=(work,), opened=opened))
        done = await self.told.get()
        assert isinstance(done, Done) and done.error is None, done
        assert done.outputs[0].error is None, done.outputs[0].error
        self.positions[seq] += 1


@contextmanager
def creditor(folder: Path, count: int) -> Iterator[tuple[str, str, str]]:
    command = [sys.executable, "-m", "benchmarks.dist_attention"]
    command += ["--creditor", str(folder), "--count", str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address, memory, wire = json.loads(process.stdout.readline())
        yield address, memory, wire
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20)


async def measure(folder: Path, context: int, steps: int) -> dict[str, float]:
    """Medians of seconds a step, by way."""
    half, whole = context // 2 // SIZE, -(-(context + steps * 2) // SIZE) + 1
    executor = open_engine(folder, 2 * whole)
    assert executor.sharing is not None
    home = Home(executor, context)
    with creditor(folder, half) as (address, memory, wire):
        first = executor.num_blocks
        executor.sharing.borrow(LOAN, first, half, address)
        ours = list(range(whole))
        theirs = list(range(whole, 2 * whole - half))
        await home.begin(1, ours)
        await home.begin(2, [*range(first, first + half), *theirs])
        backend = executor._decoder.attention
        there, here = opened(memory), region_of(backend.arena)  # type: ignore[union-attr]
        tcp = over_tcp(executor)

        async def copy() -> None:
            copy_runs(there, here, [(0, 0, half)])

        async def ship() -> None:
            await tcp.pull(wire, [(0, 0, half)])

        took: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(steps):
            took["local"].append(await timed(home, 1))
            took["lent"].append(await timed(home, 2))
            if len(took["copied"]) < max(3, steps // 4):
                took["copied"].append(await timed(home, 1, copy))
                took["shipped"].append(await timed(home, 1, ship))
        await tcp.close()
    await executor.stop()
    return {way: statistics.median(each) for way, each in took.items()}


async def timed(home: Home, seq: int, before: Callable[[], Awaitable[None]] | None = None) -> float:
    begin = time.perf_counter()
    if before is not None:
        await before()
    await home.step(seq)
    return time.perf_counter() - begin


def crossing(heads: int, dim: int, kv_heads: int, positions: int) -> tuple[int, int]:
    """Bytes a layer and step: query out, and out and lse back; and the keys and values themselves. 16 bits."""
    return heads * dim * 2 + heads * (dim * 2 + 4), positions * 2 * kv_heads * dim * 2


def at(context: int, steps: int) -> dict[str, float]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(Path(folder), SHAPE)
        config = Path(folder, "config.json")
        changed = json.loads(config.read_text()) | {"max_position_embeddings": 2 * context}
        config.write_text(json.dumps(changed))
        found = asyncio.run(measure(Path(folder), context, steps))
    return {
        "context": context,
        **{f"{way}_ms": 1e3 * seconds for way, seconds in found.items()},
        "of_local": found["local"] / found["lent"],
        "over_copied": found["copied"] / found["lent"],
        "over_shipped": found["shipped"] / found["lent"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--contexts", default="2048,16384,65536")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--creditor", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.creditor is not None:
        asyncio.run(be_creditor(told.creditor, told.count))
        return
    rows = []
    for context in map(int, told.contexts.split(",")):
        rows.append(at(context, told.steps))
        if not told.json:
            print("  ".join(f"{name} {value:,.2f}" for name, value in rows[-1].items()), flush=True)
    asked, kept = crossing(32, 128, 32, 131072)
    crosses = {"asked_bytes": asked, "kept_bytes": kept, "ratio": kept / asked}
    if told.json:
        print(json.dumps({"rows": rows, "llama2_7b_128k": crosses}))
    else:
        print(
            f"LLaMA2-7B, 128K lent, a layer and step: {asked:,} bytes for {kept:,}, 1 to {kept / asked:,.0f}"
        )


if __name__ == "__main__":
    main()
