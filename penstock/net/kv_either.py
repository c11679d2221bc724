"""Blocks between replicas of which some stand on one machine: from shared memory where it can be read, else by TCP.

Whether it can be read is asked of the system, not of addresses: the peer is of the same boot and the same namespace of
processes, and its memory opens. Else the blocks come over TCP, also from one who stands beside us in another container,
or who could not share its memory and has a socket alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from penstock.core.errors import ReplicaLost
from penstock.core.moving import KvCard
from penstock.net.blocks import Region, Runs
from penstock.net.kv_shared import SharedTransport
from penstock.net.kv_tcp import TcpTransport

SCHEME = "either:"
BOOT = Path("/proc/sys/kernel/random/boot_id")


def machine() -> str:
    """Equal for two processes that can find each other in /proc."""
    return f"{BOOT.read_text().strip()}-{os.stat('/proc/self/ns/pid').st_ino}"


class EitherTransport:
    """A core.transport.Transport of two that serve the same region."""

    def __init__(self, shared: SharedTransport, tcp: TcpTransport) -> None:
        self._shared, self._tcp, self._machine = shared, tcp, machine()
        self._unreadable: set[str] = set()

    @property
    def card(self) -> KvCard:
        shared, tcp = self._shared.card, self._tcp.card
        return replace(shared, address=f"{SCHEME}{self._machine}|{shared.address}|{tcp.address}")

    @property
    def behind(self) -> int | None:
        return self._shared.behind

    def add(self, region: Region, address: str) -> None:
        """See SharedTransport."""
        self._shared.add(region, address)
        self._tcp.add(region)

    async def sums(self, blocks: Sequence[int]) -> tuple[int, ...]:
        return await self._shared.sums(blocks)

    async def pull(self, address: str, runs: Runs) -> None:
        if not address.startswith(SCHEME):
            await self._tcp.pull(address, runs)
            return
        where, shared, tcp = address.removeprefix(SCHEME).split("|")
        if where == self._machine and shared not in self._unreadable:
            try:
                await self._shared.pull(shared, runs)
                return
            except ReplicaLost:
                self._unreadable.add(shared)
        await self._tcp.pull(tcp, runs)

    async def close(self) -> None:
        await self._shared.close()
        await self._tcp.close()
