"""Step times that vary as they were seen to vary.

A fit charges the mean of equal steps. Real ones scatter, and the tail of what callers see is made of it. A scatter
keeps the ratios measured / predicted of a calibration's steps, sorted and cut into groups of equal size, as the groups'
means over the mean of all: drawing a group draws the ratio, and the mean stays exactly what was fitted. Kinds of steps
scatter differently, for what a disturbance adds weighs more in a short step: decodes, steps with prefill chunks of at
most SHORT tokens in all, and longer ones.

A Jittered model draws a ratio for each step it is asked for, from a seeded stream. Asked twice it answers twice, so the
contract of equal instants however steps are launched does not hold for it: launch steps singly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from penstock.cost.step import StepCost, StepFeatures, StepModel

GROUPS = 32
SHORT = 256
Scatter = Mapping[str, Sequence[float]]  # by kind; a kind that is missing or empty does not scatter


def kind_of(features: StepFeatures) -> str:
    """decode, short or long."""
    if not features.num_prefills:
        return "decode"
    return "short" if features.num_tokens <= SHORT else "long"


def scatter_of(ratios: Sequence[float], groups: int = GROUPS) -> tuple[float, ...]:
    """Means of the groups; () where there are too few ratios to tell."""
    if len(ratios) < groups:
        return ()
    parts = np.array_split(np.sort(np.asarray(ratios, dtype=float)), groups)
    means = np.array([part.mean() for part in parts])
    found: list[float] = (means / means.mean()).tolist()
    return tuple(found)


class Jittered:
    """A StepModel around another. `chance` draws from [0, 1)."""

    def __init__(
        self,
        model: StepModel,
        *,
        scatter: Scatter,
        chance: Callable[[], float],
    ) -> None:
        self.model, self.name, self.digest = model, f"{model.name}, scattered", model.digest
        self._scatter, self._chance = scatter, chance

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        return self.model.seconds(features, share) * self._ratio(features)

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        found = self.model.run_seconds(features, count, share)
        return [seconds * self._ratio(features) for seconds in found]

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost:
        """The mean one."""
        return self.model.step(features, share)

    def _ratio(self, features: StepFeatures) -> float:
        ratios = self._scatter.get(kind_of(features), ())
        return ratios[int(self._chance() * len(ratios))] if ratios else 1.0
