"""The highest rate at which enough answers keep their promises: bisection on a grid of rates.

    rate(k) = step^k;  low and high enclose the last k with attained(k) >= wanted;  between the two a straight line

Rates of a grid, and not of a free bisection, so that searches for several promises share their simulations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from penstock.core.events import Event, Finished
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling, Slo
from penstock.traffic import TraceMeta
from penstock.traffic.arrivals import Poisson
from penstock.traffic.lengths import DrawnLengths

MAX_TOKENS = 4096  # what callers allow; true lengths are shorter


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


@dataclass(kw_only=True)
class Numbered:
    """`num` requests of each kind of lengths, one kind after the other, Poisson at one rate; named by their numbers."""

    lengths: Sequence[DrawnLengths]
    num: int
    rate_per_s: float
    seed: int
    slo: Slo
    longest: int
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        total = self.num * len(self.lengths)
        self.meta = TraceMeta(f"{len(self.lengths)} kinds of lengths", "drawn", total, total)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        instants = Poisson(rate_per_s=self.rate_per_s).instants(self.seed)
        kinds = [
            islice(each.draws(self.seed + place), self.num)
            for place, each in enumerate(self.lengths)
        ]
        for place, (prompt, output) in enumerate(chain.from_iterable(kinds)):
            request = Request(
                id=RequestId(str(place)),
                model="default",
                prompt=TracedPrompt(min(prompt, self.longest)),
                sampling=Sampling(max_tokens=MAX_TOKENS),
                slo=self.slo,
                true_output=output,
            )
            yield next(instants), request


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
