"""Where rows pass between the replica's process and its devices: one piece of shared memory for all of them.

    x       the rows of a step, as they enter the mixture
    rows    which of them each piece of work takes, expert by expert
    parts   what comes out, in the same order

Nobody writes where another one reads: the replica writes x and rows before it says that there is work, a device writes
the parts of its own experts, and the replica reads them when all have answered. The file has room for MOST_ROWS rows
and takes memory for as many as were ever in use at once.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.engine.torch.elastic.pages import view

MOST_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class Form:
    """What is needed to map it."""

    hidden: int
    top_k: int
    dtype: str

    @property
    def places(self) -> tuple[int, int, int]:
        """Where rows and parts begin (x begins at 0), and the bytes of all."""
        each = self.hidden * getattr(torch, self.dtype).itemsize
        rows = MOST_ROWS * each
        parts = rows + MOST_ROWS * self.top_k * 8
        return rows, parts, parts + MOST_ROWS * self.top_k * each


class Exchange:
    """The mapped memory."""

    def __init__(self, fd: int, form: Form) -> None:
        rows_at, parts_at, size = form.places
        dtype: torch.dtype = getattr(torch, form.dtype)
        self._memory = mmap.mmap(fd, size)
        many = MOST_ROWS * form.top_k
        self.x: Tensor = view(self._memory, dtype, (MOST_ROWS, form.hidden), 0)
        self.rows: Tensor = view(self._memory, torch.int64, (many,), rows_at)
        self.parts: Tensor = view(self._memory, dtype, (many, form.hidden), parts_at)


def new_memory(form: Form) -> int:
    fd = os.memfd_create("penstock-exchange", os.MFD_CLOEXEC)
    os.ftruncate(fd, form.places[2])
    return fd
