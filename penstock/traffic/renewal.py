"""Renewal arrivals whose law changes by the window: Gamma or Weibull gaps, the shape and the rate of each window given.

Theory. A renewal process has independent gaps of one law. With gaps of mean 1/rate and coefficient of variation c, the
index of dispersion of its counts tends to c^2 as the bin grows; c > 1 is bursty. Gamma gaps of shape k have
c = 1/sqrt(k); Weibull gaps of shape k have c^2 = G(1+2/k)/G(1+1/k)^2 - 1. Shape 1 is Poisson for both.

Rules
- The scale always follows from the rate: a law is (rate, shape, family). Published fits whose scale disagrees with the
  rate they count (maximum likelihood on Weibull gaps does, by up to 3.6x) would otherwise lose requests.
- counts="renewal": every window starts in equilibrium (its first wait is the residual of a length-biased gap), so that
  the expected number in a window is exactly rate x window, whatever the shape; the number itself is random.
- counts="exact": a window holds rate x window arrivals (a fraction left over is one more with that probability), its
  gaps drawn and stretched to fill it. For Gamma gaps this is the same process given its count (Dirichlet spacings).
- Windows are drawn one after the other from one stream; an instant is a whole number of nanoseconds, so that a libm
  that differs in the last bit gives the same instants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from penstock.traffic.process import BLOCK, Floats

Family = Literal["gamma", "weibull"]
Counts = Literal["renewal", "exact"]
FIRST_BLOCK = 1 << 8  # blocks double from here: short stretches are cheap, long ones fast


def cv_of_shape(family: Family, shape: float) -> float:
    """Coefficient of variation of gaps with this shape."""
    if family == "gamma":
        return 1.0 / math.sqrt(shape)
    log_ratio = math.lgamma(1 + 2 / shape) - 2 * math.lgamma(1 + 1 / shape)
    return math.sqrt(math.expm1(log_ratio))


def shape_of_cv(family: Family, cv: float) -> float:
    """The shape that gives a coefficient of variation: closed for Gamma, by bisection for Weibull."""
    if not cv > 0:
        raise ValueError(f"a coefficient of variation must be positive, got {cv}")
    if family == "gamma":
        return 1.0 / cv**2
    low, high = 0.05, 1000.0
    if not cv_of_shape(family, high) <= cv <= cv_of_shape(family, low):
        raise ValueError(f"no Weibull shape gives a coefficient of variation of {cv}")
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cv_of_shape(family, middle) > cv else (low, middle)
    return math.sqrt(low * high)


def unit_gaps(rng: np.random.Generator, family: Family, shape: float, num: int) -> Floats:
    """`num` gaps of mean 1."""
    if family == "gamma":
        return rng.gamma(shape, 1.0 / shape, num)
    return rng.weibull(shape, num) / math.gamma(1 + 1 / shape)


def first_wait(rng: np.random.Generator, family: Family, shape: float) -> float:
    """The wait until the next arrival of a process of mean gap 1 that has been running forever."""
    if family == "gamma":
        biased = rng.gamma(shape + 1.0) / shape
    else:
        biased = rng.gamma(1 + 1 / shape) ** (1 / shape) / math.gamma(1 + 1 / shape)
    return float(biased * rng.random())


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """The gaps of one window."""

    rate_per_s: float
    shape: float = 1.0
    family: Family = "gamma"

    def __post_init__(self) -> None:
        if not (self.rate_per_s >= 0 and math.isfinite(self.rate_per_s)):
            raise ValueError(f"a rate must be zero or more, got {self.rate_per_s}")
        if not (self.shape > 0 and math.isfinite(self.shape)):
            raise ValueError(f"a shape must be positive, got {self.shape}")

    @classmethod
    def of_scale(cls, family: Family, shape: float, scale: float) -> Law:
        """From shape and scale as fitting libraries give them: the rate is what their mean says."""
        mean = scale * (shape if family == "gamma" else math.gamma(1 + 1 / shape))
        return cls(rate_per_s=1 / mean, shape=shape, family=family)

    @classmethod
    def of_cv(cls, family: Family, rate_per_s: float, cv: float) -> Law:
        return cls(rate_per_s=rate_per_s, shape=shape_of_cv(family, cv), family=family)

    @property
    def cv(self) -> float:
        return cv_of_shape(self.family, self.shape)

    @property
    def scale(self) -> float:
        """As fitting libraries give it; infinite at rate 0."""
        if self.rate_per_s == 0:
            return math.inf
        unit = 1 / self.shape if self.family == "gamma" else 1 / math.gamma(1 + 1 / self.shape)
        return unit / self.rate_per_s


def endless(rng: np.random.Generator, law: Law) -> Iterator[Floats]:
    """Blocks of instants of one law, in equilibrium from 0 on; nothing at rate 0."""
    if law.rate_per_s == 0:
        return
    at, num = first_wait(rng, law.family, law.shape), FIRST_BLOCK
    while True:
        gaps = unit_gaps(rng, law.family, law.shape, num)
        ends = at + np.cumsum(gaps)
        yield np.concatenate(([at], ends[:-1])) / law.rate_per_s
        at, num = float(ends[-1]), min(2 * num, BLOCK)


def in_window(rng: np.random.Generator, law: Law, window_s: float, counts: Counts) -> Floats:
    """The instants of one window, from its start."""
    expected = law.rate_per_s * window_s
    if expected == 0:
        return np.empty(0)
    if counts == "exact":
        is_whole = abs(expected - round(expected)) < 1e-6 * expected
        num = round(expected) if is_whole else int(expected + rng.random())
        gaps = unit_gaps(rng, law.family, law.shape, num + 1)
        total = gaps.sum()
        if total == 0:  # so bursty that all gaps are below the smallest number
            return np.zeros(num)
        # The last gap may be shorter than a nanosecond, to which instants are rounded: not into the next window.
        within = np.cumsum(gaps)[:-1] * (window_s / total)
        return np.asarray(np.minimum(within, window_s - 1e-9))
    at, found = first_wait(rng, law.family, law.shape), []
    while at < expected:
        num = min(BLOCK, int((expected - at) * 1.1) + 8)
        ends = at + np.cumsum(unit_gaps(rng, law.family, law.shape, num))
        each = np.concatenate(([at], ends[:-1]))
        found.append(each[each < expected])
        at = float(ends[-1])
    return np.concatenate(found) / law.rate_per_s if found else np.empty(0)
