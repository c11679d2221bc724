"""How many ran and waited over time, in at most 1,024 bins: when they are used up, neighbours merge and bins double.

A bin keeps the last word of every replica in it (running, waiting) and the sum of tokens planned.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_BINS = 1024


class Bin(NamedTuple):
    """Sums over replicas at the end of a bin; `tokens` were planned inside it."""

    at: float
    running: int
    waiting: int
    tokens: int


class Timeline:
    """Fed in time order of each replica."""

    def __init__(self, width_s: float = 0.1) -> None:
        self.width_s = width_s
        self._start: float | None = None
        self._bins: dict[int, tuple[dict[str, tuple[int, int]], int]] = {}

    def add(self, who: str, at: float, running: int, waiting: int, tokens: int) -> None:
        if self._start is None:
            self._start = at
        index = int(max(0.0, at - self._start) / self.width_s)
        while index >= MAX_BINS:
            self._double()
            index //= 2
        states, total = self._bins.get(index, ({}, 0))
        states[who] = (running, waiting)
        self._bins[index] = (states, total + tokens)

    def _double(self) -> None:
        self.width_s *= 2
        merged: dict[int, tuple[dict[str, tuple[int, int]], int]] = {}
        for index, (states, tokens) in sorted(self._bins.items()):
            old, total = merged.get(index // 2, ({}, 0))
            merged[index // 2] = (old | states, total + tokens)
        self._bins = merged

    def bins(self) -> list[Bin]:
        """In time order; a replica that says nothing in a bin is as it last said."""
        state: dict[str, tuple[int, int]] = {}
        told = []
        for index, (states, tokens) in sorted(self._bins.items()):
            state |= states
            told.append(
                Bin(
                    (self._start or 0.0) + (index + 1) * self.width_s,
                    sum(running for running, _ in state.values()),
                    sum(waiting for _, waiting in state.values()),
                    tokens,
                )
            )
        return told
