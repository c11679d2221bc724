"""One policy for prompts, another one for who writes the answer.

Source: every system that has two pools (DistServe, P/D-Serve, xLLM) chooses in them by different rules.

Idea: a request that pauses behind its first token is routed a second time, for stage "decode", among others and by
another load; so the two questions may have two policies, and a fleet asks one.

    stage "decode"   -> `decode`
    all others       -> `first`

Parameters: the two policies; it is made of the tables `policy.route` and `policy.route_decode`, and has no name.

Does not: hear events for `decode`; what is told goes to `first`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.events import Event
from penstock.policy.route import Decision, Policy, View


@dataclass(slots=True)
class ByStage:
    first: Policy
    decode: Policy

    @property
    def observe(self) -> Callable[[Event], None] | None:
        found: Callable[[Event], None] | None = getattr(self.first, "observe", None)
        return found

    def decide(self, view: View) -> Decision:
        return (self.decode if view.stage == "decode" else self.first).decide(view)
