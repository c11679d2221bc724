"""The cores of a CPU, shared out between two lanes.

    lane 0    has the first of them, as many as its share says    0 1 2 3 4 | 5 6 7    shares 0.6 and 0.4 of eight
    lane 1    has the last of them

Shares that sum to 1 or less never meet on a core, except that each lane has one; shares that sum to more overlap in
the middle, and there the operating system divides the time. On a single core both lanes have that one. Cores that are
two halves of one physical core lie next to each other in this order, so that a split seldom runs through it.

A lane computes with as many threads as it has cores: its own, and the OpenMP team that this thread leads. Torch and our
kernels use the same team, and each leading thread has a team of its own, so the lanes share none. `Seat.take` binds all
of them; it is called between steps, on the lane's thread, and does nothing while the cores stay the same. Where the
system cannot bind threads (anything but Linux) a share is a number of threads and nothing more.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from penstock.engine.torch.kernels.library import openmp_region

MOST_LANES = 2
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
CAN_BIND = hasattr(os, "sched_setaffinity")
logger = logging.getLogger(__name__)

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Region = ctypes.CFUNCTYPE(None, _Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def cores_here(most: int | None = None) -> tuple[int, ...]:
    """The cores this process may use, halves of a physical core side by side; the first `most` of them."""
    if CAN_BIND:
        found = sorted(os.sched_getaffinity(0), key=lambda core: (_first_sibling(core), core))
    else:
        found = list(range(os.cpu_count() or 1))
    return tuple(found[:most])


def _first_sibling(core: int) -> int:
    try:
        told = Path(SIBLINGS.format(core)).read_text(encoding="ascii")
    except OSError:
        return core
    first = told.split(",")[0].split("-")[0].strip()
    return int(first) if first.isdigit() else core


def cores_of(lane: int, share: float, cores: Sequence[int]) -> tuple[int, ...]:
    """Those that a lane has with a share."""
    assert lane < MOST_LANES and 0 < share <= 1
    count = len(cores)
    if count == 1 or share == 1.0:
        return tuple(cores)
    # Rounded first, so that both lanes find the same border for shares that sum to 1.
    border = round(count * round(share if lane == 0 else 1.0 - share, 9))
    border = min(max(border, 1), count - 1)
    return tuple(cores[:border] if lane == 0 else cores[border:])


def compute_with(threads: int) -> None:
    """How many threads the calling thread computes with from now on, whatever others are told."""
    # A thread that asks for the number the first time is given what any thread set last, so that comes first.
    torch.get_num_threads()
    torch.set_num_threads(threads)


class Seat:
    """Where one lane's thread computes. Used on that thread only."""

    def __init__(self, lane: int, cores: Sequence[int]) -> None:
        self._lane, self._all = lane, tuple(cores)
        self.cores: tuple[int, ...] = ()
        self._region = openmp_region()

    def take(self, share: float) -> None:
        """Compute from now on with the cores of this share."""
        cores = cores_of(self._lane, share, self._all)
        if cores == self.cores:
            return
        self.cores = cores
        compute_with(len(cores))
        if not CAN_BIND:
            return
        try:
            os.sched_setaffinity(0, cores)
        except OSError as error:  # the cores of this process were changed from outside
            logger.warning("lane %d cannot be bound to cores %s: %s", self._lane, cores, error)
            return
        if self._region is not None and len(cores) > 1:
            bind_team(self._region, cores)


def bind_team(region: int, cores: Sequence[int]) -> None:
    """Bind every thread of the team that the calling thread leads, itself included."""

    def bind(_: int | None) -> None:
        with suppress(OSError):
            os.sched_setaffinity(0, cores)

    body = _Body(bind)
    _Region(region)(body, None, len(cores), 0)


def describe(cores: Sequence[int]) -> str:
    """For the engine's notes."""
    if not CAN_BIND:
        return (
            f"{MOST_LANES}, by number of threads of {len(cores)}: this system binds none to cores"
        )
    if len(cores) == 1:
        return f"{MOST_LANES} on one core, which both share whatever their shares"
    return f"{MOST_LANES} on cores {', '.join(map(str, cores))}, by share"
