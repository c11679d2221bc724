"""How many distinct experts a step reaches: that many experts' weights are read.

Each of n tokens takes k of E experts. If all are equally likely, an expert is missed by one token with probability
1 - k/E and by all with (1 - k/E)^n, so the expected number of experts reached is

    uniform      E (1 - (1 - k/E)^n)

Real routing is uneven. With expert e taken by a share p_e of tokens (sum p_e = k), tokens independent of each other:

    empirical    sum_e (1 - (1 - p_e)^n)        never more than the uniform number, by Jensen
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.cost.shapes import ModelShape


class Coverage(Protocol):
    def distinct(self, tokens: int) -> float:
        """Expected number of different experts that `tokens` tokens take in one layer."""
        ...


@dataclass(frozen=True, slots=True)
class UniformCoverage:
    experts: int
    top_k: int

    def distinct(self, tokens: int) -> float:
        return self.experts * (1.0 - (1.0 - self.top_k / self.experts) ** tokens)


@dataclass(frozen=True, slots=True)
class EmpiricalCoverage:
    """`shares`: for each expert, the share of tokens that took it."""

    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.shares or not all(0.0 <= share <= 1.0 for share in self.shares):
            raise ValueError("each expert needs the share of tokens that take it, between 0 and 1")

    def distinct(self, tokens: int) -> float:
        return math.fsum(1.0 - (1.0 - share) ** tokens for share in self.shares)


def coverage_of(shape: ModelShape) -> UniformCoverage | None:
    """Every expert equally likely; None for a dense model."""
    if shape.experts is None or shape.top_k is None:
        return None
    return UniformCoverage(shape.experts, shape.top_k)


def coverage_of_counts(counts: Sequence[int], tokens: int) -> EmpiricalCoverage:
    """From how often each expert was taken in a trace of `tokens` tokens."""
    return EmpiricalCoverage(tuple(count / tokens for count in counts))
