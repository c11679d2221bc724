"""Which replica takes this request? Asked by the fleet for each request and stage.

Law: the answer is a replica that is alive, not draining and of a fitting role, or None (refuse for now).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import Struct

from penstock.core.types import Report, Stage
from penstock.core.views import RequestView, Rng

ONE_OUTSTANDING = 1 << 32  # more than a replica can have jobs


def is_candidate(report: Report, stage: Stage) -> bool:
    """Whether the law allows this replica."""
    is_able = report.is_alive and not report.is_draining and not report.is_suspect
    return is_able and report.role in ("any", stage)


@dataclass(slots=True)
class Columns:
    """The candidates by name, and the load of each: requests outstanding first, then the jobs it reported.

    Both in one number, so that the least loaded of hundreds are found in a few microseconds; see `load_of`.
    """

    names: list[str]
    loads: list[int]

    @classmethod
    def of(cls, candidates: Sequence[Report], outstanding: Mapping[str, int]) -> Columns:
        reports = sorted(candidates, key=lambda report: report.replica)
        return cls(
            [report.replica for report in reports],
            [load_of(outstanding.get(report.replica, 0), report) for report in reports],
        )


def load_of(outstanding: int, report: Report) -> int:
    """Compares as (outstanding, running + waiting)."""
    return outstanding * ONE_OUTSTANDING + report.num_running + report.num_waiting


class View(Struct, gc=False):
    """`reports` may be stale; `outstanding` is the fleet's own count of requests sent and not yet ended.

    `kept`: columns that the fleet keeps up to date, so that a request costs no look at every report.
    """

    now: float
    rng: Rng
    request: RequestView
    stage: Stage
    reports: Sequence[Report]
    outstanding: Mapping[str, int]
    kept: Columns | None = None

    def candidates(self) -> list[Report]:
        """Replicas the law allows, in the order of the reports."""
        return [report for report in self.reports if is_candidate(report, self.stage)]

    def columns(self) -> Columns:
        """Read-only, and valid during the call."""
        return self.kept or Columns.of(self.candidates(), self.outstanding)


class Decision(Struct, frozen=True, gc=False):
    replica: str | None
    why: str = ""


def law(view: View, decision: Decision) -> None:
    allowed = {report.replica for report in view.candidates()}
    assert decision.replica is None or decision.replica in allowed, (
        f"{decision.replica} cannot take it"
    )


def after(last: str | None, names: Sequence[str]) -> str:
    """Whose turn it is after `last`: the next of the sorted names, then from the start."""
    place = 0 if last is None else bisect_right(names, last)
    return names[place] if place < len(names) else names[0]


class Policy(Protocol):
    def decide(self, view: View) -> Decision: ...
