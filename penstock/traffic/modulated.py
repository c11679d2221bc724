"""Arrival processes made of others: a day's swing, one after the other, faster or slower."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from penstock.traffic.process import (
    Arrivals,
    Drawn,
    Floats,
    blocks_of,
    check_positive,
    generator,
    mean_rate_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diurnal(Drawn):
    """`inner` with its clock run at 1 + (peak_to_mean - 1) cos(2 pi (t - peak_at_s) / period_s).

    Time-rescaling: an arrival of `inner` at operational time x comes when the integral of that speed reaches x. The
    speed is held constant over 1/4096 of the period, so that the integral is inverted exactly.
    """

    kind: ClassVar[str] = "diurnal"
    inner: Arrivals
    peak_to_mean: float = 1.8
    period_s: float = 86400.0
    peak_at_s: float = 50400.0
    STEPS: ClassVar[int] = 4096

    def __post_init__(self) -> None:
        check_positive(period_s=self.period_s)
        if not 1 <= self.peak_to_mean <= 2:
            raise ValueError(f"peak_to_mean must be from 1 to 2, got {self.peak_to_mean}")

    def elapsed(self, at_s: Floats) -> Floats:
        """Operational time at clock times, both from 0; exact at the ends of steps, linear between."""
        turn = 2 * math.pi / self.period_s
        swing = np.sin(turn * (at_s - self.peak_at_s)) + math.sin(turn * self.peak_at_s)
        return np.asarray(at_s + (self.peak_to_mean - 1) / turn * swing)

    def blocks(self, seed: int) -> Iterator[Floats]:
        clock = np.linspace(0.0, self.period_s, self.STEPS + 1)
        ran = self.elapsed(clock)
        for block in blocks_of(self.inner, seed):
            whole, rest = np.divmod(block, self.period_s)
            yield whole * self.period_s + np.interp(rest, ran, clock)

    @property
    def mean_rate_per_s(self) -> float:
        return mean_rate_of(self.inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A process for so long."""

    duration_s: float
    arrivals: Arrivals

    def __post_init__(self) -> None:
        check_positive(duration_s=self.duration_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows(Drawn):
    """One process after the other, each begun anew at its window's start and cut at its end."""

    kind: ClassVar[str] = "windows"
    windows: tuple[Window, ...]
    is_repeated: bool = False

    def __post_init__(self) -> None:
        if not self.windows:
            raise ValueError("windows needs at least one window")

    def blocks(self, seed: int) -> Iterator[Floats]:
        start_s, number = 0.0, 0
        while True:
            for window in self.windows:
                own = generator(seed, self.kind, str(number)).integers(1 << 62)
                for block in blocks_of(window.arrivals, int(own)):
                    yield start_s + block[block < window.duration_s]
                    if len(block) and block[-1] >= window.duration_s:
                        break
                start_s, number = start_s + window.duration_s, number + 1
            if not self.is_repeated:
                return

    @property
    def mean_rate_per_s(self) -> float:
        parts = [(each.duration_s, mean_rate_of(each.arrivals)) for each in self.windows]
        return math.fsum(span * rate for span, rate in parts) / math.fsum(span for span, _ in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled(Drawn):
    """`inner` with its instants divided by `speed`: BurstGPT's scaling of requests a second."""

    kind: ClassVar[str] = "scaled"
    inner: Arrivals
    speed: float

    def __post_init__(self) -> None:
        check_positive(speed=self.speed)

    def blocks(self, seed: int) -> Iterator[Floats]:
        for block in blocks_of(self.inner, seed):
            yield block / self.speed

    @property
    def mean_rate_per_s(self) -> float:
        return mean_rate_of(self.inner) * self.speed


def at_rate(arrivals: Arrivals, rate_per_s: float) -> Arrivals:
    """The same process at another mean rate, by playing it faster or slower."""
    return Scaled(inner=arrivals, speed=rate_per_s / mean_rate_of(arrivals))
