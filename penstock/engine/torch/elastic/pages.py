"""Memory of experts: an arena for each device, cut into pages of one size, one expert of one layer in each.

An arena is a file without a name in shared memory. Who owns it and who computes with it are two things: the replica's
process holds all arenas open and knows which expert lies in which page, a device process maps the arena it is given.
So an arena outlives its process, another process takes it over without copying a byte, and devices read each other's
pages. The file has room for every expert of the model and takes memory only for pages that were written; a page that
is dropped gives its memory back at once.

A page is a packed layer in the form of packed_file.py: packed tensors with a small head in front, so that linear layers
are made over the page where it lies.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from penstock.core.errors import BadConfig
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.mlp import PlainMlp
from penstock.engine.torch.packed_file import (
    ALIGNMENT,
    Unkept,
    offsets_of,
    read_from,
    size_of,
    take_apart,
)

Place = tuple[int, int]  # (layer, expert)
ALONE = Alone()


def can_share() -> bool:
    return hasattr(os, "memfd_create") and hasattr(mmap, "MADV_REMOVE")


class Arena:
    """The pages of one device, as its owner keeps books of them."""

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.fd = os.memfd_create("penstock-experts", os.MFD_CLOEXEC)
        self.num_bytes = num_pages * page_bytes
        os.ftruncate(self.fd, self.num_bytes)
        self.pages: dict[Place, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))

    def take(self, places: Iterable[Place]) -> list[tuple[Place, int]]:
        """Pages for them, which are not in use before `pages` has them."""
        return [(place, self._free.pop()) for place in places]

    def give(self, pages: Iterable[int]) -> None:
        self._free.extend(pages)

    def punch(self, pages: Iterable[int]) -> None:
        """Give their memory back where no process is left to do it."""
        with mmap.mmap(self.fd, 0) as memory:
            for page in pages:
                memory.madvise(mmap.MADV_REMOVE, page * self.page_bytes, self.page_bytes)

    def close(self) -> None:
        os.close(self.fd)


class Packed:
    """One expert in pieces."""

    def __init__(self, expert: PlainMlp) -> None:
        try:
            self.head, self.tensors = take_apart(expert, ALONE)
        except Unkept as why:
            raise BadConfig(
                f"experts of this model cannot lie in shared memory: {why}",
                hint='leave expert_devices out, or set executor.linear = "plain"',
            ) from None
        self.offsets = offsets_of(self.tensors, len(self.head))
        self.num_bytes = max(
            [
                len(self.head),
                *(at + one.nbytes for at, one in zip(self.offsets, self.tensors, strict=True)),
            ]
        )

    @property
    def page_bytes(self) -> int:
        """Of a page for it, or for one whose head is a little longer."""
        slack = self.num_bytes + ALIGNMENT
        return slack + -slack % ALIGNMENT


class Pages:
    """An arena in the process that maps it."""

    def __init__(self, fd: int, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.memory = mmap.mmap(fd, 0)
        self._bytes = np.frombuffer(self.memory, np.uint8)
        os.close(fd)

    def write(self, page: int, packed: Packed) -> None:
        if packed.num_bytes > self.page_bytes:
            raise BadConfig(
                "experts of this model differ in size, and cannot lie in pages of one size",
                hint="leave expert_devices out",
            )
        at = page * self.page_bytes
        self.memory[at : at + len(packed.head)] = packed.head
        for tensor, offset in zip(packed.tensors, packed.offsets, strict=True):
            flat = tensor.flatten().view(torch.uint8).numpy()
            self._bytes[at + offset : at + offset + flat.size] = flat

    def read(self, page: int) -> PlainMlp:
        """The expert, over the page."""
        found = read_from(self.memory, page * self.page_bytes, ALONE)
        assert isinstance(found, PlainMlp)
        return found

    def copy(self, other: Pages, there: int, here: int) -> None:
        """What is written of a page: to read the rest would give it memory."""
        begin, source = here * self.page_bytes, there * self.page_bytes
        size = size_of(other.memory, source)
        self._bytes[begin : begin + size] = other._bytes[source : source + size]

    def drop(self, page: int) -> None:
        self.memory.madvise(mmap.MADV_REMOVE, page * self.page_bytes, self.page_bytes)


def view(memory: mmap.mmap, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
