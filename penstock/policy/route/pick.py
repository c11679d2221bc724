"""Filter, score, pick: the shape of most routers, and the small things that they share.

    filters   each gives back those that stay; one that would leave nobody is passed over
    scorers   a number for each replica, multiplied by its weight and summed. More is better
    pick      the highest sum, each in turn among equals

Scores are made relative where a policy says so: `spread` puts the least at 0 and the most at 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import repeat

from penstock.core.types import Report
from penstock.core.views import Behind
from penstock.policy.route import View, after

Filter = Callable[[View, list[Report]], list[Report]]
NOTHING = Behind()
Score = Callable[[View, list[Report]], Sequence[float]]


class Turns:
    """Chooses among the best; equals take turns."""

    def __init__(self) -> None:
        self._last: str | None = None

    def most(self, names: Sequence[str], scores: Sequence[float]) -> str:
        return self._turn(names, scores, max(scores))

    def least(self, names: Sequence[str], costs: Sequence[float]) -> str:
        return self._turn(names, costs, min(costs))

    def _turn(self, names: Sequence[str], values: Sequence[float], wanted: float) -> str:
        if values.count(wanted) == 1:
            self._last = names[values.index(wanted)]
        else:
            pairs = zip(names, values, strict=True)
            self._last = after(self._last, sorted(name for name, value in pairs if value == wanted))
        return self._last


def filtered(view: View, filters: Sequence[Filter], reports: list[Report]) -> list[Report]:
    for each in filters:
        reports = each(view, reports) or reports
    return reports


def scored(
    view: View, scorers: Sequence[tuple[Score, float]], reports: list[Report]
) -> list[float]:
    totals = [0.0] * len(reports)
    for score, weight in scorers:
        if weight:
            found = score(view, reports)
            totals = [total + weight * one for total, one in zip(totals, found, strict=True)]
    return totals


def spread(values: Sequence[float]) -> list[float]:
    """The least at 0, the most at 1; all at 1 where they are the same."""
    least, most = min(values), max(values)
    if most == least:
        return [1.0] * len(values)
    return [(value - least) / (most - least) for value in values]


def with_behind(
    view: View, reports: Sequence[Report], credits: Sequence[float], host: float, disk: float
) -> Sequence[float]:
    """Credits for what each holds on its device, and `host` and `disk` more for a block behind that."""
    behind = view.behind()
    if not behind:
        return credits
    each_behind = map(behind.get, view.names(reports), repeat(NOTHING))
    pairs = zip(credits, each_behind, strict=True)
    return [credit + host * each.host + disk * each.disk for credit, each in pairs]


class Rates:
    """Requests a second that each replica was sent in the last `window_s`, by a router's own count."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._sent: deque[tuple[float, str]] = deque()
        self._counts: dict[str, int] = {}

    def add(self, now: float, name: str) -> None:
        self._sent.append((now, name))
        self._counts[name] = self._counts.get(name, 0) + 1

    def of(self, now: float, names: Sequence[str]) -> list[float]:
        sent, counts = self._sent, self._counts
        while sent and sent[0][0] <= now - self._window_s:
            counts[sent.popleft()[1]] -= 1
        return [counts.get(name, 0) / self._window_s for name in names]
