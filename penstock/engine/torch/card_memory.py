"""Blocks of keys and values on a card, copied from and to the host's memory beside the steps: a net.blocks.Memory.

Blocks that lie anywhere are first brought together on the card, which takes it next to no time, so that one long copy
goes over the bus. Every thread that copies has a stream of its own, which waits for what the steps have queued; who
called goes on when the copy is done. Where the card has no memory left to bring blocks together, ReplicaLost is raised
of copies for peers, who do without. Copies to host memory and back (`fetch_rows`, `store_rows`) must not fail, as plans
read what they bring: they go piece by piece then, which needs no memory.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from penstock.core.errors import ReplicaLost
from penstock.net.blocks import Region

logger = logging.getLogger(__name__)


class CardMemory:
    """`arena` [pieces, blocks, ...], on a card; on a CPU, in tests, nothing has to be waited for."""

    def __init__(self, arena: Tensor) -> None:
        assert arena.is_contiguous(), "a copy of the cache would be of no use"
        self._rows = arena.view(arena.shape[0], arena.shape[1], -1)
        self._is_cuda = arena.is_cuda
        self._own = threading.local()
        self._pinned: set[int] = set()

    @property
    def shape(self) -> tuple[int, ...]:
        pieces, blocks, size = self._rows.shape
        return pieces, blocks, size * self._rows.element_size()

    def fetch(self, blocks: Sequence[int], into: Region) -> None:
        def gather() -> None:
            self._as_rows(into).copy_(self._rows[:, self._at(blocks)], non_blocking=True)

        self._beside(gather)

    def store(self, blocks: Sequence[int], packed: Region) -> None:
        def scatter() -> None:
            rows = self._as_rows(packed).to(self._rows.device, non_blocking=True)
            self._rows.index_copy_(1, self._at(blocks), rows)

        self._beside(scatter)

    def fetch_rows(self, blocks: Sequence[int], into: Tensor) -> None:
        """The same into a tensor [blocks, pieces, ...], a block's pieces side by side."""

        def gather() -> None:
            together = self._rows.transpose(0, 1)[self._at(blocks)].contiguous()
            into.copy_(together, non_blocking=True)

        def one_by_one() -> None:
            for rows, block in zip(into, blocks, strict=True):
                for there, piece in zip(rows, self._rows, strict=True):
                    there.copy_(piece[block], non_blocking=True)

        self._beside(gather, one_by_one)

    def store_rows(self, blocks: Sequence[int], packed: Tensor) -> None:
        def scatter() -> None:
            rows = packed.to(self._rows.device, non_blocking=True)
            self._rows.index_copy_(1, self._at(blocks), rows.transpose(0, 1))

        def one_by_one() -> None:
            for rows, block in zip(packed, blocks, strict=True):
                for here, piece in zip(rows, self._rows, strict=True):
                    piece[block].copy_(here, non_blocking=True)

        self._beside(scatter, one_by_one)

    def pin(self, window: Region) -> None:
        if self._is_cuda and window.nbytes:
            driver = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            told = driver.cudaHostRegister(window.ctypes.data, window.nbytes, 0)
            if int(told) == 0:
                self._pinned.add(window.ctypes.data)
            else:
                logger.warning("copies of blocks are slower, as memory cannot be pinned: %s", told)

    def unpin(self, window: Region) -> None:
        if window.ctypes.data in self._pinned:
            self._pinned.discard(window.ctypes.data)
            driver = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            driver.cudaHostUnregister(window.ctypes.data)

    def _as_rows(self, region: Region) -> Tensor:
        return torch.from_numpy(region).view(self._rows.dtype)

    def _at(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, device=self._rows.device)

    def _beside(self, copy: Callable[[], None], sparing: Callable[[], None] | None = None) -> None:
        """`sparing` does the same and takes no memory of the card."""
        with torch.inference_mode():
            if not self._is_cuda:
                _tried(copy, sparing)
                return
            device = self._rows.device
            stream: torch.cuda.Stream | None = getattr(self._own, "stream", None)
            if stream is None:
                stream = self._own.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.default_stream(device))
            with torch.cuda.stream(stream):
                _tried(copy, sparing)
            stream.synchronize()


def _tried(copy: Callable[[], None], sparing: Callable[[], None] | None) -> None:
    try:
        copy()
        return
    except torch.OutOfMemoryError:
        if sparing is None:
            raise ReplicaLost(
                "the card has no memory left to copy blocks with",
                hint="leave it some: cache.memory_bytes or cache.num_blocks",
            ) from None
    sparing()  # what was taken so far is let go by now
