"""How many tokens an answer will have: the distribution of recent answers, conditioned on what is known already.

Keeps the lengths of the last `window` answers that ended by themselves or at their cap (cancelled ones say nothing
about length). For a job that has produced k tokens the distribution is that of the kept lengths above k; each estimate
is at most the job's max_tokens. Until `enough` answers were seen, or when none kept is longer than k, the estimate is
max_tokens: cautious, and what engines without predictions assume.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable

from penstock.core.events import Event, Finished
from penstock.core.views import JobView


class RecentLengths:
    """Implements core.views.Lengths; learns by `observe`, which its replica calls with every event."""

    def __init__(self, window: int = 1000, enough: int = 32) -> None:
        assert 1 <= enough <= window, "a window must hold enough answers"
        self._window, self._enough = window, enough
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def observe(self, event: Event) -> None:
        if isinstance(event, Finished) and event.reason in ("stop", "length"):
            self.add(event.num_output)

    def add(self, num_output: int) -> None:
        """Note the length of an answer that ended."""
        self._recent.append(num_output)
        insort(self._sorted, num_output)
        if len(self._recent) > self._window:
            oldest = self._recent.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]

    def quantile(self, job: JobView, q: float) -> int:
        """The smallest kept length L above num_output with P(length <= L | length > num_output) >= q."""
        return self._rank(job, lambda num: math.ceil(q * num) - 1)

    def sample(self, job: JobView, u: float) -> int:
        return self._rank(job, lambda num: int(u * num))

    def _rank(self, job: JobView, place: Callable[[int], int]) -> int:
        if len(self._sorted) < self._enough:
            return job.max_tokens
        first = bisect_right(self._sorted, job.num_output)
        num = len(self._sorted) - first
        if not num:
            return job.max_tokens
        found = self._sorted[first + min(max(place(num), 0), num - 1)]
        return min(found, job.max_tokens)
