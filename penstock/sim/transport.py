"""Modelled copies of blocks between replicas: each device has one wire out and one in, and a copy takes all of both
ends.

    begins at = max(asked at, the instants at which the source's wires out and the target's wires in are free)
    ends at   = begins at + bytes / (fewer devices * bandwidth);  is heard of at = ends at + latency

Heads are divided over devices. Of p devices each sends 1/p of the bytes and of q each receives 1/q, whoever it is from,
so the end with fewer of them takes longer: p = 4 to q = 2 is two devices that receive what four send. What a device
cuts a block into for two others is not priced.

A copy from a replica that has gone meanwhile fails when it would have ended. Its successor has another address, as
other memory has: else whoever was told of the one would read the other.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from penstock.core.clock import now
from penstock.core.errors import ReplicaLost
from penstock.core.moving import KvCard
from penstock.core.transport import Runs
from penstock.sim.channel import Link


class _Wires:
    def __init__(self, devices: int) -> None:
        self.devices = devices
        self.out_at = self.in_at = 0.0


class Attending(Protocol):
    """A replica that keeps context for others (sim.lending)."""

    def attend(self, at: float, seconds: float) -> float:
        """Somebody's queries come, which take so long; the instant at which they are answered."""
        ...


class Fabric:
    """What all replicas of a simulation are connected by; `num_bytes` were copied so far."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.wires: dict[str, _Wires] = {}
        self.lenders: dict[str, Attending] = {}  # by address, as wires are
        self.num_bytes = 0
        self._num_at = Counter[str]()

    def fresh(self, place: str) -> str:
        """An address that nobody has had."""
        self._num_at[place] += 1
        number = self._num_at[place]
        return place if number == 1 else f"{place}#{number}"

    def carry(self, source: str, target: str, num_bytes: float) -> float | None:
        """Take the wires of both; the instant at which a copy has come. None: one of them is not there."""
        here, there = self.wires.get(target), self.wires.get(source)
        if here is None or there is None:
            return None
        begin = max(now(), there.out_at, here.in_at)
        bytes_per_s = min(there.devices, here.devices) * self.link.bytes_per_s
        there.out_at = here.in_at = end = begin + num_bytes / bytes_per_s
        return end + self.link.latency_s


class ModelledTransport:
    """One replica's end of a fabric; a core.transport.Transport. There are no bytes to sum up.

    `behind`: the number of the first block of host memory. `embedding_bytes`: of one token of an image.
    """

    def __init__(
        self, fabric: Fabric, card: KvCard, behind: int | None = None, embedding_bytes: int = 0
    ) -> None:
        self.fabric, self._card, self.behind = fabric, card, behind
        self._embedding_bytes = embedding_bytes
        self._wires = fabric.wires[card.address] = _Wires(card.devices)

    @property
    def card(self) -> KvCard:
        return self._card

    async def pull(self, address: str, runs: Runs) -> None:
        await self._copy(address, self._card.block_bytes * sum([count for _, _, count in runs]))

    async def pull_embeddings(self, address: str, num_tokens: int) -> int:
        """Of so many tokens; their bytes, when they are here. Raises ReplicaLost."""
        num_bytes = self._embedding_bytes * num_tokens
        await self._copy(address, num_bytes)
        return num_bytes

    async def _copy(self, address: str, num_bytes: int) -> None:
        link, source = self.fabric.link, self.fabric.wires.get(address)
        if source is None:
            raise ReplicaLost(f"there is nothing at {address}")
        end = self.fabric.carry(address, self._card.address, num_bytes)
        if end is not None and not link.is_ideal:
            await _until(end)
        if self.fabric.wires.get(address) is not source:
            raise ReplicaLost(f"{address} has gone while it was read")
        self.fabric.num_bytes += num_bytes

    async def sums(self, blocks: Sequence[int]) -> tuple[int, ...]:
        return (0,) * len(blocks)

    async def close(self) -> None:
        if self.fabric.wires.get(self._card.address) is self._wires:
            del self.fabric.wires[self._card.address]


async def _until(at: float) -> None:
    loop = asyncio.get_running_loop()
    reached = loop.create_future()
    timer = loop.call_at(at, reached.set_result, None)
    try:
        await reached
    finally:
        timer.cancel()
