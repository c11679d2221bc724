"""What an arrival process is: the protocol, and the half that every kind shares.

Rules: instants are seconds from 0, never falling. They are drawn in numpy blocks from the project's one tree of seeded
streams under the names "traffic" and the kind, so that adding a process changes no other. What leaves is a whole number
of nanoseconds, so that a libm that differs in the last bit gives the same instants on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from penstock.core.rng import stream

Floats = NDArray[np.float64]
BLOCK = 1 << 14  # draws at a time


def generator(seed: int, *names: str) -> np.random.Generator:
    """The numpy stream of `names` under `seed`."""
    bits = stream(seed, "traffic", *names).getrandbits(128)
    return np.random.Generator(np.random.PCG64(bits))


def rounded(instants: Floats) -> Floats:
    """To whole nanoseconds."""
    return np.round(instants, 9)


@runtime_checkable
class Arrivals(Protocol):
    """When requests come."""

    def instants(self, seed: int) -> Iterator[float]:
        """Seconds from 0, never falling; the same for the same seed."""
        ...


class Drawn:
    """Arrivals made in blocks. A kind gives `blocks` and `mean_rate_per_s`."""

    __slots__ = ()
    kind: ClassVar[str]

    def blocks(self, seed: int) -> Iterator[Floats]:
        """Instants, as many at a time as suits the process; no block need hold any."""
        raise AssertionError(f"{type(self).__name__} draws no blocks")

    @property
    def mean_rate_per_s(self) -> float:
        """Arrivals a second in the long run (of those that end: until the end)."""
        raise AssertionError(f"{type(self).__name__} has no rate")

    def instants(self, seed: int) -> Iterator[float]:
        for block in self.blocks(seed):
            yield from rounded(block).tolist()

    def until(self, end_s: float, seed: int) -> Floats:
        """All instants before `end_s`, at once."""
        found = []
        for block in self.blocks(seed):
            found.append(block[block < end_s])
            if len(block) and block[-1] >= end_s:
                break
        return rounded(np.concatenate(found)) if found else np.empty(0)


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive, got {value}")


def blocks_of(arrivals: Arrivals, seed: int) -> Iterator[Floats]:
    """Blocks of any arrivals: their own, or their instants one by one."""
    if isinstance(arrivals, Drawn):
        return arrivals.blocks(seed)
    return (np.array([at_s]) for at_s in arrivals.instants(seed))


def mean_rate_of(arrivals: Arrivals) -> float:
    """Arrivals a second in the long run; nan when the process does not say."""
    return float(getattr(arrivals, "mean_rate_per_s", math.nan))
