"""What describes a workload: dispersion of counts, spread of gaps, distance of distributions, quantiles. Numpy only.

- Index of dispersion of counts at width w: variance over mean of the numbers of arrivals in whole bins of w seconds.
  1 for Poisson at every w; c^2 in the limit for renewal gaps of coefficient of variation c; it adds over independent
  streams weighted by rate. A bin cut off by the end of the trace is not counted.
- Coefficient of variation of gaps: standard deviation over mean.
- Kolmogorov-Smirnov distance of two samples: the largest gap between their distribution functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

QUANTILES = (0.5, 0.9, 0.99)


def counts_in_bins(
    instants: ArrayLike, width_s: float, *, start_s: float = 0.0, end_s: float | None = None
) -> NDArray[np.int64]:
    """Arrivals in each whole bin of [start_s, end_s); the end is the last arrival unless told."""
    at = np.asarray(instants, np.float64)
    if end_s is None:
        end_s = float(at.max()) if len(at) else start_s
    num_bins = int((end_s - start_s) / width_s * (1 + 1e-12))
    numbers = np.floor((at - start_s) / width_s).astype(np.int64)
    inside = numbers[(numbers >= 0) & (numbers < num_bins)]
    return np.bincount(inside, minlength=num_bins)


def dispersion(
    instants: ArrayLike, width_s: float, *, start_s: float = 0.0, end_s: float | None = None
) -> float:
    """Index of dispersion of counts; nan with fewer than two bins or no arrivals."""
    counts = counts_in_bins(instants, width_s, start_s=start_s, end_s=end_s)
    if len(counts) < 2 or not counts.any():
        return math.nan
    return float(counts.var(ddof=1) / counts.mean())


def gap_cv(instants: ArrayLike) -> float:
    """Coefficient of variation of the gaps between arrivals; nan with fewer than two gaps."""
    gaps = np.diff(np.asarray(instants, np.float64))
    if len(gaps) < 2 or gaps.mean() == 0:
        return math.nan
    return float(gaps.std(ddof=1) / gaps.mean())


def ks_distance(first: ArrayLike, second: ArrayLike) -> float:
    """Two-sample Kolmogorov-Smirnov distance, 0 to 1."""
    one, other = np.sort(np.asarray(first)), np.sort(np.asarray(second))
    if not len(one) or not len(other):
        return math.nan
    points = np.concatenate([one, other])
    below_one = np.searchsorted(one, points, side="right") / len(one)
    below_other = np.searchsorted(other, points, side="right") / len(other)
    return float(np.abs(below_one - below_other).max())


def quantiles(values: ArrayLike, at: Sequence[float] = QUANTILES) -> dict[float, float]:
    """Quantiles by linear interpolation; empty without values."""
    found = np.asarray(values)
    if not len(found):
        return {}
    return dict(zip(at, np.quantile(found, at).tolist(), strict=True))
