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


class _Open:
    """A bin that is filled: the last word of each replica, tokens."""

    __slots__ = ("states", "tokens")

    def __init__(self) -> None:
        self.states: dict[str, tuple[int, int]] = {}
        self.tokens = 0


class Timeline:
    """Fed in time order of each replica."""

    def __init__(self, width_s: float = 0.1) -> None:
        self.width_s = width_s
        self._start: float | None = None
        self._bins: dict[int, _Open] = {}

    def add(self, who: str, at: float, running: int, waiting: int, tokens: int) -> None:
        if self._start is None:
            self._start = at
        index = int((at - self._start) / self.width_s) if at > self._start else 0
        while index >= MAX_BINS:
            self._double()
            index //= 2
        bin = self._bins.get(index)
        if bin is None:
            bin = self._bins[index] = _Open()
        bin.states[who] = (running, waiting)
        bin.tokens += tokens

    def _double(self) -> None:
        self.width_s *= 2
        merged: dict[int, _Open] = {}
        for index, bin in sorted(self._bins.items(), key=lambda item: item[0]):
            into = merged.setdefault(index // 2, _Open())
            into.states |= bin.states
            into.tokens += bin.tokens
        self._bins = merged

    def bins(self) -> list[Bin]:
        """In time order; a replica that says nothing in a bin is as it last said."""
        state: dict[str, tuple[int, int]] = {}
        told = []
        for index, bin in sorted(self._bins.items(), key=lambda item: item[0]):
            state |= bin.states
            told.append(
                Bin(
                    (self._start or 0.0) + (index + 1) * self.width_s,
                    sum(running for running, _ in state.values()),
                    sum(waiting for _, waiting in state.values()),
                    bin.tokens,
                )
            )
        return told
