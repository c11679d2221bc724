"""How fast blocks of keys and values get from one process to another, beside a plain copy of memory.

    python -m benchmarks.kv_transfer                   # a minute
    python -m benchmarks.kv_transfer --megabytes 256 --rounds 9
    python -m benchmarks.kv_transfer --megabytes 1024 --device cuda     # between two processes' memory on one card

A second process holds a region [pieces, blocks, bytes]; this one pulls it. In turns, the best of `--rounds` each:

    memcpy        the same bytes inside this process, in one copy
    one run       all blocks, consecutive at both ends (net.kv_shared)
    scattered     all blocks, one by one, in random order
    tcp packed    a part of them in one answer: packed, sent, scattered (net.kv_tcp)
    tcp by block  the same part, one request and answer a block

Ratios are printed as well: what a run reaches of memcpy, and what packing gains over single sends.

On a card (net.kv_staged): one copy of the same size from the card to pinned memory, and scattered blocks by both ways
that two replicas have, a window of shared memory and sockets; blocks of 2 MiB, and of a sixteenth of that.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import numpy as np
import torch

from penstock.core.moving import KvCard
from penstock.engine.torch.card_memory import CardMemory
from penstock.net.blocks import Region, block_bytes
from penstock.net.kv_link import KvLink
from penstock.net.kv_shared import SharedFile, SharedTransport
from penstock.net.kv_staged import StagedTransport
from penstock.net.kv_tcp import TcpTransport

PIECES = 16  # keys and values of eight layers
SIZES = (64, 256, 2048, 16384)  # bytes of a block in one piece
TCP_BYTES = 16 << 20
MOST_SINGLE = 300  # blocks that are asked for one by one


def shared_region(shape: tuple[int, ...]) -> tuple[Region, str]:
    file = SharedFile(int(np.prod(shape)))
    return np.frombuffer(file.memory, np.uint8).reshape(shape), file.address(shape)


async def hold(shape: tuple[int, ...]) -> None:
    """The other process: a region, by both ways, until stdin ends."""
    region, address = shared_region(shape)
    region[:] = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    served = TcpTransport(region, layout="", block_size=16)
    print(address, served.card.address, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await served.close()


async def seconds(act: Callable[[], Awaitable[None]]) -> float:
    began_at = time.perf_counter()
    await act()
    return time.perf_counter() - began_at


class Measured:
    """One size of block: what is pulled, by which way."""

    def __init__(self, region: Region, shared: SharedTransport, tcp: TcpTransport) -> None:
        self.region, self._shared, self._tcp = region, shared, tcp
        self.blocks = region.shape[1]
        order = list(range(self.blocks))
        random.Random(1).shuffle(order)
        self._scattered = [(there, here, 1) for here, there in enumerate(order)]
        self.few = min(MOST_SINGLE, self.blocks, max(1, TCP_BYTES // block_bytes(region)))
        self._from, self._to = np.ones_like(region), np.ones_like(region)

    async def memcpy(self) -> None:
        np.copyto(self._to, self._from)

    async def one_run(self, address: str) -> None:
        await self._shared.pull(address, [(0, 0, self.blocks)])

    async def scattered(self, address: str) -> None:
        await self._shared.pull(address, self._scattered)

    async def packed(self, address: str) -> None:
        await self._tcp.pull(address, self._scattered[: self.few])

    async def by_block(self, address: str) -> None:
        for run in self._scattered[: self.few]:
            await self._tcp.pull(address, [run])


async def measure(shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Bytes a second, the best of each."""
    other = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kv_transfer", "--hold", "x".join(map(str, shape))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdin is not None and other.stdout is not None
    region, own = shared_region(shape)
    card = KvCard(layout="", address=own, block_size=16, block_bytes=block_bytes(region))
    shared = SharedTransport(region, card)
    tcp = TcpTransport(region, layout="", block_size=16)
    try:
        at_shared, at_tcp = other.stdout.readline().split()
        of = Measured(region, shared, tcp)
        part = of.few * block_bytes(region)
        ways: dict[str, tuple[Callable[[], Awaitable[None]], int]] = {
            "memcpy": (of.memcpy, region.nbytes),
            "one run": (lambda: of.one_run(at_shared), region.nbytes),
            "scattered": (lambda: of.scattered(at_shared), region.nbytes),
            "tcp packed": (lambda: of.packed(at_tcp), part),
            "tcp by block": (lambda: of.by_block(at_tcp), part),
        }
        best = dict.fromkeys(ways, 0.0)
        for _ in range(rounds):
            for name, (act, num_bytes) in ways.items():
                best[name] = max(best[name], num_bytes / await seconds(act))
        return best
    finally:
        other.stdin.close()
        other.wait()
        await shared.close()
        await tcp.close()


def staged(shape: tuple[int, ...], link: KvLink) -> StagedTransport:
    arena = torch.randint(0, 255, shape, dtype=torch.uint8, device="cuda")
    return StagedTransport(CardMemory(arena), layout="", block_size=16, link=link)


async def hold_card(shape: tuple[int, ...]) -> None:
    """The other process: memory of the card, until stdin ends."""
    served = staged(shape, KvLink())
    print(served.card.address, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await served.close()


async def measure_card(shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Bytes a second, the best of each."""
    other = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kv_transfer", "--hold-card", "x".join(map(str, shape))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdin is not None and other.stdout is not None
    total, order = int(np.prod(shape)), list(range(shape[1]))
    random.Random(1).shuffle(order)
    runs = [(there, here, 1) for here, there in enumerate(order)]
    pinned = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    here = torch.zeros(total, dtype=torch.uint8, device="cuda")
    ends = {"window": staged(shape, KvLink()), "sockets": staged(shape, KvLink(kind="tcp"))}

    async def copy() -> None:
        pinned.copy_(here, non_blocking=True)
        torch.cuda.synchronize()

    try:
        address = other.stdout.readline().strip()
        best = {"to the host": 0.0, **dict.fromkeys(ends, 0.0)}
        for _ in range(rounds):
            best["to the host"] = max(best["to the host"], total / await seconds(copy))
            for name, end in ends.items():
                took = await seconds(functools.partial(end.pull, address, runs))
                best[name] = max(best[name], total / took)
        return best
    finally:
        other.stdin.close()
        other.wait()
        for end in ends.values():
            await end.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--hold", help=argparse.SUPPRESS)
    parser.add_argument("--hold-card", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.hold_card:
        asyncio.run(hold_card(tuple(int(each) for each in told.hold_card.split("x"))))
        return
    if told.device == "cuda":
        for size in (128 << 10, 8 << 10):
            shape = (PIECES, (told.megabytes << 20) // (PIECES * size), size)
            best = asyncio.run(measure_card(shape, told.rounds))
            said = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in best.items())
            print(f"blocks of {PIECES * size >> 10} KiB: {said}", flush=True)
        return
    if told.hold:
        asyncio.run(hold(tuple(int(each) for each in told.hold.split("x"))))
        return
    names = ("memcpy", "one run", "scattered", "tcp packed", "tcp by block")
    print(
        "GB/s      " + "".join(f"{name:>14}" for name in names) + "   run/memcpy  packed/by block"
    )
    for size in SIZES:
        shape = (PIECES, (told.megabytes << 20) // (PIECES * size), size)
        best = asyncio.run(measure(shape, told.rounds))
        figures = "".join(f"{best[name] / 1e9:14.2f}" for name in names)
        run, packed = best["one run"] / best["memcpy"], best["tcp packed"] / best["tcp by block"]
        print(f"{PIECES * size / 1024:6.0f} KiB{figures}{run:13.2f}{packed:17.1f}", flush=True)


if __name__ == "__main__":
    main()
