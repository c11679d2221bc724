"""Blocks of KV memory as bytes, and copies between two of them: [pieces, blocks, bytes of a block in a piece].

A run of blocks that is consecutive at both ends is one stretch of memory in each piece, and so one copy. numpy makes
them and lets other threads run meanwhile. Blocks that lie scattered are packed into one buffer and scattered again only
where something has to carry them (net.kv_tcp): between two mappings that would be one more copy of everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Region = NDArray[np.uint8]
Runs = Sequence[tuple[int, int, int]]  # first block there, first block here, count


def block_bytes(region: Region) -> int:
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
