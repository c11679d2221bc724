"""How many answers ran and waited over time, as a client counts them, for the picture of `penstock bench`.

At most MAX_BINS bins: when they are used up, neighbours merge and bins double. A bin keeps the last word of every
source in it. What replicas held, peaks and memory with it, is in `report.series`.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_BINS = 1024


class Bin(NamedTuple):
    """Sums over sources at the end of a bin."""

    at: float
    running: int
    waiting: int


States = dict[str, tuple[int, int]]  # the last word of each source: running, waiting


class Timeline:
    """Fed in time order of each source."""

    def __init__(self, width_s: float = 0.1) -> None:
        self.width_s = width_s
        self._start: float | None = None
        self._bins: dict[int, States] = {}

    def add(self, who: str, at: float, running: int, waiting: int) -> None:
        if self._start is None:
            self._start = at
        index = int((at - self._start) / self.width_s) if at > self._start else 0
        while index >= MAX_BINS:
            self._double()
            index //= 2
        self._bins.setdefault(index, {})[who] = (running, waiting)

    def _double(self) -> None:
        self.width_s *= 2
        merged: dict[int, States] = {}
        for index, states in sorted(self._bins.items()):
            merged.setdefault(index // 2, {}).update(states)
        self._bins = merged

    def bins(self) -> list[Bin]:
        """In time order; a source that says nothing in a bin is as it last said."""
        state: States = {}
        told = []
        for index, states in sorted(self._bins.items()):
            state |= states
            told.append(
                Bin(
                    (self._start or 0.0) + (index + 1) * self.width_s,
                    sum(running for running, _ in state.values()),
                    sum(waiting for _, waiting in state.values()),
                )
            )
        return told
