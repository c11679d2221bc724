"""A conversation stays where it began; who belongs to none goes where the fewest requests a second go.

Source: `session` and its fallback of the vLLM production stack (Python router).

Idea: turns of one conversation share nearly all of their prompts, and its id is all that a router needs to keep them
together. The id stands on a ring of replicas (route.ring), so that a replica that comes or goes moves few of them.

    key       the request's program (the gateway fills it from a header); requests without one go to the lowest QPS
    QPS       requests sent there in the last `window_s`, by this router's own count

Parameters
    key         "program", or "tenant" to keep all that an API key sends together
    window_s    default 60

Where we differ: among equal rates the replicas take turns, where the stack takes the first of its list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from penstock.policy.route import Decision, View
from penstock.policy.route.pick import Rates, Turns
from penstock.policy.route.ring import Ring, place_of


@dataclass(slots=True)
class Session:
    key: Literal["program", "tenant"] = "program"
    window_s: float = 60.0
    _ring: Ring = field(init=False, compare=False, repr=False)
    _rates: Rates = field(init=False, compare=False, repr=False)
    _turns: Turns = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.window_s > 0:
            raise ValueError(f"window_s must be a positive number of seconds, got {self.window_s}")
        self._ring, self._rates, self._turns = Ring(), Rates(self.window_s), Turns()

    def decide(self, view: View) -> Decision:
        names = view.columns().names
        if not names:
            return Decision(None, "no replica can take it")
        session = view.request.program if self.key == "program" else view.request.tenant
        if session is not None:
            self._ring.keep(names)
            chosen, why = self._ring.owner(place_of(session.encode())), "its session"
        else:
            rates = self._rates.of(view.now, names)
            chosen, why = self._turns.least(names, rates), f"{min(rates):.2f} requests/s"
        self._rates.add(view.now, chosen)
        return Decision(chosen, why)
