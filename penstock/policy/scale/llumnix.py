"""Keeps the mean freeness of a fleet within bounds.

Source: Llumnix (Sun et al., OSDI 2024), section 4.4.3; the thresholds and the period are the paper's and v1's defaults.

Idea: freeness (policy.move.llumnix) says how many steps replicas can go on; when its mean over the fleet falls below
`least` a replica is added, when it rises above `most` the one with the fewest running requests is put out. Where
requests move (move "llumnix") it empties at once, as a replica that drains has no freeness; otherwise it ends what it
has.

Parameters: `least`, `most` (blocks a job), `urgent_blocks` that a replica with urgent jobs is to hold
at most (None: no headroom), `every_s` (period).

Where we differ: a replica without jobs counts as one job's, so an idle one has its whole memory as freeness; means are
cut at `most` times two for each replica, or one idle replica would hide that the others are full.

Does not: add more than one replica a period, or know how long one takes to come up (those on their way count as idle).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from penstock.policy.loads import neg_freeness
from penstock.policy.scale import Decision, View


@dataclass(slots=True)
class Llumnix:
    least: float = 10.0
    most: float = 60.0
    urgent_blocks: int | None = 100
    every_s: float = 10.0
    needs_steady: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.least < self.most:
            raise ValueError(f"least must be above 0 and below most, got {self.least}, {self.most}")
        if not self.every_s > 0:
            raise ValueError(f"every_s must be a positive number of seconds, got {self.every_s}")

    def decide(self, view: View) -> Decision:
        active = view.active()
        coming = sum(view.starting.values())
        have = len(active) + coming
        if not active:
            return Decision()
        cap = 2 * self.most
        found = [min(cap, -neg_freeness(each, self.urgent_blocks)) for each in active]
        mean = (sum(found) + cap * coming) / have
        why = f"mean freeness {mean:.1f} of {have} replicas"
        if mean < self.least and have < view.bounds.most:
            return Decision(add={"any": 1}, why=why)
        if mean > self.most and have > view.bounds.least and len(active) > 1:
            emptiest = min(active, key=lambda each: (each.num_running, each.replica))
            return Decision(drain=(emptiest.replica,), why=why)
        return Decision()
