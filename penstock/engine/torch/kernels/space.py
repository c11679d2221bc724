"""Memory for packed weights: parts of regions that lie in large pages.

Decoding streams through all weights for every token, which is slower in small pages. A layer's weights are often less
than one large page, so layers share regions; a region goes when the last tensor in it does.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.engine.torch.kernels import library as native

REGION_BYTES = 64 << 20
ALIGNMENT = 4096


class Space:
    """Threads may ask at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._region: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, library: native.Library) -> Tensor:
        size = torch.Size(shape).numel()
        num_bytes = size * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        with self._lock:
            region, at = self._place(num_bytes, library)
        return torch.frombuffer(region, dtype=dtype, count=size, offset=at).view(tuple(shape))

    def _place(self, num_bytes: int, library: native.Library) -> tuple[mmap.mmap, int]:
        if num_bytes > REGION_BYTES // 4:
            return _region(num_bytes, library), 0
        if self._region is None or self._used + num_bytes > len(self._region):
            self._region, self._used = _region(REGION_BYTES, library), 0
        at = self._used
        self._used += num_bytes + -num_bytes % ALIGNMENT
        return self._region, at


def _region(num_bytes: int, library: native.Library) -> mmap.mmap:
    region = mmap.mmap(-1, num_bytes, access=mmap.ACCESS_COPY)
    library.large_pages(torch.frombuffer(region, dtype=torch.uint8).data_ptr(), num_bytes)
    return region


SPACE = Space()
