"""What was asked of a run: how many, how fast, how bursty, how long; from its arrivals, in bounded memory.

Arrivals at a fleet count where there is one, since those at its replicas are the same requests. Dispersion is that of
`traffic.statistics`, counted as arrivals pass, where there are windows enough to say anything.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from penstock.core.events import Arrived, Finished
from penstock.report.histogram import Histogram

WINDOWS_S = (1.0, 60.0)
MIN_WINDOWS = 10  # fewer say nothing about dispersion
PERCENTS = (50, 90, 99)


class Offered:
    """Fed with Arrived and Finished events; `fleets` names those who are fleets."""

    def __init__(self) -> None:
        self.fleets: set[str] = set()
        self.num = 0
        self.num_requests = 0
        self.first_at: float | None = None
        self.last_at = 0.0
        self.tenants: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self.prompt = Histogram()
        self.output = Histogram()
        self._counts: dict[float, defaultdict[int, int]] = {
            size: defaultdict(int) for size in WINDOWS_S
        }

    def add(self, event: Arrived) -> None:
        if self.fleets and event.who not in self.fleets:
            return
        if self.first_at is None:
            self.first_at = event.at
        self.last_at = event.at
        self.num += event.n
        self.num_requests += 1
        self.tenants[event.tenant] += event.n
        self.models[event.model] += event.n
        self.prompt.add(event.num_prompt)
        for size, counts in self._counts.items():
            counts[int((event.at - self.first_at) / size)] += 1

    def end(self, event: Finished) -> None:
        if event.num_output:
            self.output.add(event.num_output)

    @property
    def duration_s(self) -> float:
        return 0.0 if self.first_at is None else self.last_at - self.first_at

    @property
    def rate_per_s(self) -> float | None:
        return self.num / self.duration_s if self.duration_s > 0 else None

    def dispersion(self, size_s: float) -> float | None:
        """Over whole windows of `size_s`; None when there are too few of them."""
        counts, num = self._counts[size_s], int(self.duration_s / size_s)
        if num < MIN_WINDOWS:
            return None
        found = [counts.get(i, 0) for i in range(num)]
        mean = sum(found) / num
        return sum((each - mean) ** 2 for each in found) / (num - 1) / mean if mean else None

    def lengths(self) -> list[tuple[str, int, float | None, list[float | None], float]]:
        """Name, number, mean, percentiles and greatest of prompt and output tokens."""
        return [
            (name, found.num, found.mean, [found.percentile(each) for each in PERCENTS], found.most)
            for name, found in (("prompt tokens", self.prompt), ("output tokens", self.output))
        ]
