"""A histogram whose size depends on the range of the values, not on their number.

Buckets grow by 2^(1/64), so a bucket is 1.09% wide and a percentile is off by at most 0.55% of itself; counts, sum,
least and greatest are exact. Used where values are too many to keep: the gaps between tokens. Zeros (several
tokens of one step) have a bucket of their own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from operator import sub

PER_OCTAVE = 64
REL_ERROR = 2 ** (0.5 / PER_OCTAVE) - 1


class Histogram:
    """Counts of non-negative values."""

    def __init__(self) -> None:
        self.counts: defaultdict[int | None, int] = defaultdict(int)
        self.num = 0
        self.total = 0.0
        self.least = math.inf
        self.most = 0.0

    def add(self, value: float, count: int = 1) -> None:
        self.counts[math.floor(math.log2(value) * PER_OCTAVE) if value > 0 else None] += count
        self.num += count
        self.total += value * count
        self.least = min(self.least, value)
        self.most = max(self.most, value)

    def add_gaps(self, instants: Sequence[float], count: int = 1) -> None:
        """Add the differences between neighbours of `instants`, each `count` times.

        Steps of one launch last almost equally long: mostly all gaps fall into one bucket, and none is looked at alone.
        """
        gaps = list(map(sub, islice(instants, 1, None), instants))
        if not gaps:
            return
        least, most = min(gaps), max(gaps)
        if least > 0:
            bucket = math.floor(math.log2(least) * PER_OCTAVE)
            low, high = 2 ** (bucket / PER_OCTAVE), 2 ** ((bucket + 1) / PER_OCTAVE)
            if low <= least and most < high:
                self.counts[bucket] += len(gaps) * count
            else:
                self._count(gaps, count)
        else:
            self._count(gaps, count)
        self.least = min(self.least, least)
        self.most = max(self.most, most)
        self.num += len(gaps) * count
        self.total += (instants[-1] - instants[0]) * count

    def _count(self, gaps: Sequence[float], count: int) -> None:
        """Count into buckets; a gap most often falls into the bucket of the one before."""
        low = high = 0.0
        bucket, held = None, 0
        for gap in gaps:
            if not low <= gap < high:
                self.counts[bucket] += held
                held = 0
                if gap > 0:
                    bucket = math.floor(math.log2(gap) * PER_OCTAVE)
                    low, high = 2 ** (bucket / PER_OCTAVE), 2 ** ((bucket + 1) / PER_OCTAVE)
                else:
                    bucket, low, high = None, 0.0, 0.0
            held += count
        self.counts[bucket] += held

    def merge(self, other: Histogram) -> None:
        for bucket, count in other.counts.items():
            self.counts[bucket] += count
        self.num += other.num
        self.total += other.total
        self.least = min(self.least, other.least)
        self.most = max(self.most, other.most)

    @property
    def mean(self) -> float | None:
        return self.total / self.num if self.num else None

    def percentile(self, percent: float) -> float | None:
        """The value that `percent` of 100 values do not exceed; None when there are none."""
        if not self.num:
            return None
        rank = max(1, math.ceil(self.num * percent / 100))
        if rank == self.num:
            return self.most
        seen = self.counts.get(None, 0)
        if seen >= rank:
            return 0.0
        for bucket in sorted(bucket for bucket in self.counts if bucket is not None):
            seen += self.counts[bucket]
            if seen >= rank:
                middle = 2 ** ((bucket + 0.5) / PER_OCTAVE)
                return min(max(middle, self.least), self.most)
        raise AssertionError("the counts do not sum to their number")
