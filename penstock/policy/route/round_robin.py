"""Each replica in turn.

Source: textbook; `round_robin` of the SGLang router and `roundrobin` of the vLLM production stack.

Idea: the n-th request goes to the replica after the one that took the last. Nothing is measured, so nothing can be
stale; equal requests spread as evenly as possible.

Parameters: none.

Where we differ: the turn goes by name and not by position, so a replica that comes, goes or drains shifts nobody
else's turn. Each stage (prefill, decode) has its own turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.types import Stage
from penstock.policy.route import Decision, View, after


@dataclass(slots=True)
class RoundRobin:
    _last: dict[Stage, str] = field(init=False, default_factory=dict, repr=False)

    def decide(self, view: View) -> Decision:
        names = view.columns().names
        if not names:
            return Decision(None, "no replica can take it")
        chosen = after(self._last.get(view.stage), names)
        self._last[view.stage] = chosen
        return Decision(chosen, "its turn")
