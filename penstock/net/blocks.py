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
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Region = NDArray[np.uint8]
Runs = Sequence[tuple[int, int, int]]  # first block there, first block here, count
SUMMED_BYTES = 8 << 20  # at a time
WORD_BYTES, WEIGHT = 8, 0x9E3779B97F4A7C15


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
        found: list[int] = []
        for region, numbers in self.pieces_of(blocks):
            step = max(1, SUMMED_BYTES // block_bytes(region))
            for start in range(0, len(numbers), step):
                found += _sums(region, numbers[start : start + step])
        return tuple(found)

    def _place(self, block: int) -> tuple[Region, int]:
        for region in self.regions:
            if block < region.shape[1]:
                return region, block
            block -= region.shape[1]
        raise AssertionError("there is no such block")


def _sums(region: Region, blocks: list[int]) -> list[int]:
    """Of each the sum of its words of 8 bytes, each times an odd number of its place, modulo 2 to the 64th.

    So another word anywhere makes another sum, and two that changed places nearly always do. A few calls of numpy are
    all of it: one for each piece would have to wait for the interpreter's lock each time, beside steps that run.
    """
    taken = pack(region, blocks)
    pieces, num, size = taken.shape
    if size % WORD_BYTES:
        return [zlib.crc32(np.ascontiguousarray(taken[:, at]).data) for at in range(num)]
    words = taken.view(np.uint64)
    found: list[int] = np.einsum("pbw,pw->b", words, _weights(pieces, size // WORD_BYTES)).tolist()
    return found


@lru_cache(maxsize=8)
def _weights(pieces: int, words: int) -> NDArray[np.uint64]:
    places = np.arange(1, pieces * words + 1, dtype=np.uint64)
    return (places * np.uint64(WEIGHT) | np.uint64(1)).reshape(pieces, words)
