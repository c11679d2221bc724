"""As many replicas as the requests under way need at a given number each.

Source: textbook target tracking, as the autoscalers of Ray Serve (target_ongoing_requests) and Knative (concurrency
target) do it; the thresholds around the target are ours.

Idea: wanted = ceil(requests under way / target). More are added at once, up to the bounds; fewer only when the rest
would still be below `slack` of the target, one at a time and the emptiest first, so that a short lull costs nothing.
Of equals the last by name goes: those that came later have less in their caches.

Parameters: `target` requests a replica; `slack` (share of the target) that one fewer must keep to; `every_s` between
two looks.

Where we differ: Ray Serve smooths over a window and delays each direction by its own time; here `every_s` is both.

Does not: know that requests differ, look at latencies, or change roles. Replicas it adds are of role "any".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from penstock.policy.scale import Decision, View


@dataclass(slots=True)
class PerReplica:
    target: float = 8.0
    slack: float = 0.8
    every_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.target > 0 or not self.every_s > 0:
            raise ValueError("target and every_s must be positive")
        if not 0 < self.slack <= 1:
            raise ValueError(f"slack must be above 0 and at most 1, got {self.slack}")

    def decide(self, view: View) -> Decision:
        active = view.active()
        have = len(active) + sum(view.starting.values())
        under_way = sum(view.outstanding.get(report.replica, 0) for report in active)
        wanted = min(max(math.ceil(under_way / self.target), view.bounds.least), view.bounds.most)
        why = f"{under_way} requests under way on {have} replicas"
        if wanted > have:
            return Decision(add={"any": wanted - have}, why=why)
        can_shrink = len(active) > 1 and have > view.bounds.least
        if can_shrink and under_way <= self.slack * self.target * (have - 1):
            loads = [view.outstanding.get(report.replica, 0) for report in active]
            emptiest = len(loads) - 1 - loads[::-1].index(min(loads))
            return Decision(drain=(active[emptiest].replica,), why=why)
        return Decision()
