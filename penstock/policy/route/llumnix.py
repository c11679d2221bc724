"""A request goes to the replica with the most freeness, or the least of another of Llumnix's loads.

Source: Llumnix (Sun et al., OSDI 2024), section 4.4.1, and the dispatch policy "load" of AlibabaPAI/llumnix (v1) with
its metrics kv_blocks_ratio and remaining_steps; the first is also what the paper's baseline INFaaS++ dispatches by.

Idea: what decides how long a request can run undisturbed is memory that is left for each running request, not how many
requests there are. `metric` says what that is measured by (policy.loads):

    freeness   blocks left for each running job, what the head of the queue asks for counted as used (the paper)
    steps      blocks left, all that waits counted, for each job that runs or waits (v1's default)
    kv_ratio   used and waiting blocks as a share of all (v1 for prefill replicas; INFaaS++)

What was sent since a replica reported counts as waiting. Among equals the replicas take turns.

Parameters: `metric`, `urgent_blocks` that a replica with urgent jobs is to hold at most (freeness only; None: no
headroom for them).

Where we differ: v1 draws among the best `k`; k is 1 there too unless told otherwise.

Does not: know prefixes, or come back to a decision: that is what moves are for (move "llumnix").
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from penstock.core.types import Report
from penstock.policy.loads import Sent, freeness_jobs, kv_ratio, neg_freeness, neg_steps
from penstock.policy.route import Decision, View, after


@dataclass(slots=True)
class Llumnix:
    metric: Literal["freeness", "steps", "kv_ratio"] = "freeness"
    urgent_blocks: int | None = 100
    _last: str | None = field(default=None, init=False)
    needs_steady: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.urgent_blocks is not None and self.urgent_blocks < 0:
            raise ValueError(f"urgent_blocks must be at least 0, got {self.urgent_blocks}")

    def decide(self, view: View) -> Decision:
        able = view.candidates()
        if not able:
            return Decision(None, "no replica takes requests")
        loads = view.loads(self._load, able)
        least, pairs = min(loads), zip(view.names(able), loads, strict=True)
        self._last = after(self._last, sorted(name for name, load in pairs if load == least))
        return Decision(self._last, f"{self.metric} {abs(least):.2f}")

    def _load(self, report: Report, sent: Sent) -> float:
        if self.metric == "kv_ratio":
            return kv_ratio(report, sent)
        if self.metric == "steps":
            return neg_steps(report, sent)
        told, jobs = neg_freeness(report, self.urgent_blocks), freeness_jobs(report)
        return (told * jobs + sent.blocks) / (jobs + sent.num)
