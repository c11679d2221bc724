"""The replica with the fewest requests outstanding.

Source: textbook (join the shortest queue); `least_load` of the SGLang router.

Idea: the fleet counts what it sent and what ended, so its count is never stale. Fewest wins; among equals the one
that last reported fewer jobs; among those each in turn.

    key(replica) = (outstanding, reported running + waiting)

Parameters: none.

Where we differ: the fleet's own count comes first and reports only break ties, since a report may be a second old
and a count of old reports sends every request of that second to one replica.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.types import Stage
from penstock.policy.route import ONE_OUTSTANDING, Decision, View, after


@dataclass(slots=True)
class Least:
    _last: dict[Stage, str] = field(init=False, default_factory=dict, repr=False)

    def decide(self, view: View) -> Decision:
        columns = view.columns()
        if not columns.names:
            return Decision(None, "no replica can take it")
        least = min(columns.loads)
        places = zip(columns.names, columns.loads, strict=True)
        equals = [name for name, load in places if load == least]
        chosen = self._last[view.stage] = after(self._last.get(view.stage), equals)
        return Decision(chosen, f"{least // ONE_OUTSTANDING} outstanding")
