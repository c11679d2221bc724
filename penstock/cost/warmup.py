"""The first step of a fresh process costs more: a step model that charges it once, for the executor of one replica.

Predictions use the model itself; only what the device takes remembers that it has not run before.
"""

from __future__ import annotations

from penstock.cost.step import StepCost, StepFeatures, StepModel


class ColdStart:
    """`model`, its first priced step made `first_step_s` longer."""

    def __init__(self, model: StepModel, first_step_s: float) -> None:
        self.model, self._extra_s = model, first_step_s

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def digest(self) -> str:
        return self.model.digest

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        extra_s, self._extra_s = self._extra_s, 0.0
        seconds = self.model.seconds(features, share)
        return seconds + extra_s if extra_s else seconds

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        found = self.model.run_seconds(features, count, share)
        if self._extra_s and count:
            found[0] += self._extra_s
            self._extra_s = 0.0
        return found

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost:
        return self.model.step(features, share)
