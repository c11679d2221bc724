"""Loads of all candidates of a fleet, kept between decisions.

A router that compares replicas wants one load or another of each of them (policy.loads), at every request; between two
requests two or three replicas have changed. So what a load says is kept, and asked again only of those replicas whose
report came, or which were sent something or ended it, since: whoever changes either adds the name to `stale`.

Work: a load is asked O(replicas changed) times a decision, instead of once of each replica.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from penstock.core.types import Report
from penstock.policy.loads import NOTHING_SENT, Sent

Number = TypeVar("Number", int, float)
Load = Callable[[Report, Sent], Number]


class KeptLoads:
    """Of `able`, in their order. `sent` and `stale` are kept up by whoever counts what is sent (cluster.dispatches)."""

    __slots__ = ("able", "names", "by_name", "_places", "_sent", "_stale", "_values")

    def __init__(self, able: list[Report], sent: Mapping[str, Sent], stale: set[str]) -> None:
        self.able = able
        self.names = [each.replica for each in able]
        self.by_name = dict(zip(self.names, able, strict=True))
        self._places = {name: place for place, name in enumerate(self.names)}
        self._sent, self._stale = sent, stale
        self._values: dict[Load[Any], list[Any]] = {}

    def hear(self, report: Report) -> None:
        """A candidate's next report."""
        name = report.replica
        self.able[self._places[name]] = self.by_name[name] = report
        self._stale.add(name)

    def of(self, load: Load[Number]) -> list[Number]:
        """Read-only, and valid until the next call. `load` is kept, so it must be a function that stays."""
        if self._stale:
            self._settle()
        found = self._values.get(load)
        if found is None:
            found = self._values[load] = loads_of(load, self.able, self._sent)
        return found

    def check(self) -> None:
        """What is kept is what the reports say."""
        for load in self._values:
            fresh = loads_of(load, self.able, self._sent)
            assert self.of(load) == fresh, f"{load} as it was kept is not that of the reports"

    def _settle(self) -> None:
        for name in self._stale:
            place = self._places.get(name)
            if place is not None:
                report, sent = self.able[place], self._sent.get(name, NOTHING_SENT)
                for load, values in self._values.items():
                    values[place] = load(report, sent)
        self._stale.clear()


def loads_of(
    load: Load[Number], reports: Sequence[Report], sent: Mapping[str, Sent]
) -> list[Number]:
    """Of each, asked anew."""
    return [load(each, sent.get(each.replica, NOTHING_SENT)) for each in reports]
