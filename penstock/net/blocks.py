"""Blocks of KV memory as bytes, and copies between two of them: [pieces, blocks, bytes of a block in a piece].

A run of blocks that is consecutive at both ends is one stretch of memory in each piece, and so one copy. numpy makes
them and lets other threads run meanwhile. Blocks that lie scattered are packed into one buffer and scattered again only
where something has to carry them (net.kv_tcp): between two mappings that would be one more copy of everything.

A replica may have several regions that peers read, the device's blocks and the host memory behind them: their blocks
are numbered on, and `Readable` finds them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Region = NDArray[np.uint8]
Runs = Sequence[tuple[int, int, int]]  # first block there, first block here, count


class Memory(Protocol):
    """[pieces, blocks, bytes] of a card. Any thread may call; what steps have queued before is waited for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def fetch(self, blocks: Sequence[int], into: Region) -> None:
        """Packed, to the host's memory; return when they are there."""
        ...

    def store(self, blocks: Sequence[int], packed: Region) -> None:
        """The other way."""
        ...

    def pin(self, window: Region) -> None:
        """Copies to and from this memory of the host's will be many: make them fast, if that can be."""
        ...

    def unpin(self, window: Region) -> None: ...


def block_bytes(region: Region | Memory) -> int:
    return int(region.shape[0] * region.shape[2])


def copy_runs(there: Region, here: Region, runs: Runs) -> None:
    for first, start, count in runs:
        here[:, start : start + count] = there[:, first : first + count]


def pack(region: Region, blocks: Sequence[int]) -> Region:
    """These blocks, in order, in one buffer."""
    return np.take(region, blocks, axis=1)


def scatter(region: Region, blocks: Sequence[int], packed: Region) -> None:
    region[:, blocks] = packed


def blocks_there(runs: Runs) -> list[int]:
    return [first + at for first, _, count in runs for at in range(count)]


def blocks_here(runs: Runs) -> list[int]:
    return [start + at for _, start, count in runs for at in range(count)]


class Readable:
    """Regions whose blocks are numbered on; all have the same pieces, and blocks of the same size."""

    def __init__(self, *regions: Region) -> None:
        self.regions = regions
        self.num_blocks = sum([region.shape[1] for region in regions])

    def pieces_of(self, blocks: Sequence[int]) -> Iterator[tuple[Region, list[int]]]:
        """Neighbours of one region at a time, in order: the region, and its own numbers of them."""
        found: list[int] = []
        before: Region | None = None
        for block in blocks:
            region, number = self._place(block)
            if region is not before and found and before is not None:
                yield before, found
                found = []
            before = region
            found.append(number)
        if before is not None:
            yield before, found

    def pack(self, blocks: Sequence[int]) -> Region:
        """These blocks, in order, in one buffer."""
        packed = [pack(region, numbers) for region, numbers in self.pieces_of(blocks)]
        return packed[0] if len(packed) == 1 else np.concatenate(packed, axis=1)

    def copy_to(self, here: Region, runs: Runs) -> None:
        if len(self.regions) == 1:
            copy_runs(self.regions[0], here, runs)
            return
        for first, start, count in runs:
            at = start
            for region, numbers in self.pieces_of(range(first, first + count)):
                copy_runs(region, here, [(numbers[0], at, len(numbers))])
                at += len(numbers)

    def sums(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """A checksum of each."""
        return tuple([_sum(*self._place(block)) for block in blocks])

    def _place(self, block: int) -> tuple[Region, int]:
        for region in self.regions:
            if block < region.shape[1]:
                return region, block
            block -= region.shape[1]
        raise AssertionError("there is no such block")


def _sum(region: Region, block: int) -> int:
    told = 0
    for piece in region:
        told = zlib.crc32(piece[block].data, told)
    return told
