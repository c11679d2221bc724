"""The highest rate at which enough answers keep their promises: bisection on a grid of rates.

    rate(k) = step^k;  low and high enclose the last k with attained(k) >= wanted;  between the two a straight line

Rates of a grid, and not of a free bisection, so that searches for several promises share their simulations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.core.events import Event, Finished


def highest_rate(
    attained: Callable[[int], float], *, low: int, high: int, step: float, wanted: float
) -> float:
    """Between step^low and step^high; 0 where not even the lowest will do. `attained` falls with k, more or less."""
    at_low, at_high = attained(low), 0.0
    if at_low < wanted:
        return 0.0
    while high - low > 1:
        middle = (low + high) // 2
        found = attained(middle)
        if found >= wanted:
            low, at_low = middle, found
        else:
            high, at_high = middle, found
    part = (at_low - wanted) / max(at_low - at_high, 1e-9)
    return float(step**low + min(1.0, part) * (step**high - step**low))


@dataclass
class Kept:
    """TTFT and TPOT of every answer whose request is numbered from `first` on; requests are named by their numbers."""

    first: int = 0
    times: list[tuple[float, float]] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        if not isinstance(event, Finished) or int(event.request) < self.first:
            return
        if event.first_token_at is None or event.last_token_at is None:
            self.times.append((float("inf"), 0.0))
            return
        later = max(1, event.num_output - 1)
        gap_s = (event.last_token_at - event.first_token_at) / later
        self.times.append((event.first_token_at - event.arrived_at, gap_s))

    def attainment(self, ttft_s: float, tpot_s: float) -> float:
        kept = sum(first <= ttft_s and gap <= tpot_s for first, gap in self.times)
        return kept / len(self.times)
