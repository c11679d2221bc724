"""How blocks of keys and values get from one replica's memory into another's: a port like those of core.ports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from penstock.core.moving import KvCard

Runs = Sequence[tuple[int, int, int]]  # first block there, first block here, count


class Transport(Protocol):
    """Brings blocks of other replicas' KV memory into this one's. Whoever has room asks: nothing is pushed.

    The peer holds the blocks, unchanged, until it is told that they came: that is its replica's affair. A peer that
    dies meanwhile makes `pull` raise, or hands over what it held, which is as good.
    """

    @property
    def card(self) -> KvCard:
        """Ours, by which peers find us."""
        ...

    @property
    def behind(self) -> int | None:
        """By which number peers read block 0 of the host memory behind ours; None: they cannot."""
        ...

    async def pull(self, address: str, runs: Runs) -> None:
        """Copy them; return when they are here. Raises ReplicaLost."""
        ...

    async def sums(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """A checksum of each of our blocks, by the numbers that peers read them by: the same for the same contents."""
        ...

    async def close(self) -> None: ...


class EmbeddingTransport(Transport, Protocol):
    """One of a replica that takes images, which peers may have encoded."""

    async def pull_embeddings(self, address: str, num_tokens: int) -> int:
        """Copy the embeddings of so many tokens; the bytes, when they are here. Raises ReplicaLost."""
        ...
