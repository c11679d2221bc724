"""Which replica takes this request? Asked by the fleet for each request and stage.

Law: the answer is a replica that is alive, not draining and of a fitting role, or None (refuse for now).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.core.types import Report, Stage
from penstock.core.views import RequestView, Rng


@dataclass(slots=True)
class View:
    """`reports` may be stale; `outstanding` is the fleet's own count of requests sent and not yet ended."""

    now: float
    rng: Rng
    request: RequestView
    stage: Stage
    reports: Sequence[Report]
    outstanding: Mapping[str, int]

    def candidates(self) -> list[Report]:
        """Replicas the law allows, in the order of the reports."""
        return [
            report
            for report in self.reports
            if report.is_alive and not report.is_draining and report.role in ("any", self.stage)
        ]


@dataclass(frozen=True, slots=True)
class Decision:
    replica: str | None
    why: str = ""


def law(view: View, decision: Decision) -> None:
    allowed = {report.replica for report in view.candidates()}
    assert decision.replica is None or decision.replica in allowed, (
        f"{decision.replica} cannot take it"
    )


def after(last: str | None, names: Sequence[str]) -> str:
    """Whose turn it is after `last`: the next name in alphabetical order, then from the start."""
    return min(names, key=lambda name: (last is not None and name <= last, name))


class Policy(Protocol):
    def decide(self, view: View) -> Decision: ...
