"""The replica that holds the longest beginning of the prompt, whatever its queue; the lightest among equals.

Source: "Cache Affinity" of DualMap's evaluation: one end of the scale whose other end is least-tokens.

Idea: never compute twice what somebody holds.

    chosen = the most prompt tokens held; among equals the fewest prompt tokens to compute (policy.loads)

Parameters: none.

Where we differ: nothing; it is there to be compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from penstock.policy.route import Decision, View
from penstock.policy.route.pick import Turns


@dataclass(slots=True)
class Affinity:
    needs_blocks: ClassVar[bool] = True
    _turns: Turns = field(init=False, compare=False, repr=False, default_factory=Turns)

    def decide(self, view: View) -> Decision:
        able = view.candidates()
        if not able:
            return Decision(None, "no replica can take it")
        hits = view.hits(able)
        most = max(hits)
        best = [report for report, hit in zip(able, hits, strict=True) if hit == most]
        loads = view.pendings(best)
        chosen = self._turns.least([report.replica for report in best], loads)
        return Decision(chosen, f"{most} tokens held, {min(loads)} before it")
