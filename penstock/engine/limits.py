"""Binds a limit policy to whoever shares something inside a replica (core.limits.Limits)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from penstock.core.events import Event
from penstock.core.limits import Holder
from penstock.core.views import Rng
from penstock.policy import limit


class BoundLimits:
    """Asks one limit policy; every answer is held to the kind's law, since it is asked seldom and costs little."""

    def __init__(self, policy: limit.Policy) -> None:
        self._policy = policy
        self._observe = getattr(policy, "observe", None)

    def ask(
        self, now: float, rng: Rng, holders: Sequence[Holder], supply: float
    ) -> Mapping[str, float]:
        view = limit.View(now, rng, holders, supply)
        decision = self._policy.decide(view)
        limit.law(view, decision)
        return decision.caps

    def observe(self, event: Event) -> None:
        if self._observe is not None:
            self._observe(event)
