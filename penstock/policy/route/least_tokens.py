"""The replica with the fewest prompt tokens to compute.

Source: textbook (join the shortest queue, measured in work); "Least Loaded" of DualMap's evaluation.

Idea: prompts differ a thousandfold, so requests are a poor measure of a queue before the first token.

    load(i) = prompt tokens that wait or are under way there, and were sent since (policy.loads)

Parameters: none.

Where we differ: waiting tokens that are cached do not count where replicas tell of their blocks. Equals take turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.policy.route import Decision, View
from penstock.policy.route.pick import Turns


@dataclass(slots=True)
class LeastTokens:
    _turns: Turns = field(init=False, compare=False, repr=False, default_factory=Turns)

    def decide(self, view: View) -> Decision:
        able = view.candidates()
        if not able:
            return Decision(None, "no replica can take it")
        loads = view.pendings(able)
        chosen = self._turns.least(view.names(able), loads)
        return Decision(chosen, f"{min(loads)} prompt tokens before it")
