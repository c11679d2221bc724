"""Step times that vary as they were seen to vary.

A fit charges the mean of equal steps. Real ones scatter, and the tail of what callers see is made of it. A scatter
keeps the ratios measured / fitted of a calibration's steps, sorted and cut into groups of equal size, as the groups'
means; drawing a group draws the ratio. Kinds of steps scatter differently, for what a disturbance adds weighs more in a
short step: decodes, steps with prefill chunks of at most SHORT tokens in all, and longer ones. The mean of a kind is
its measured time over its fitted time, so that what the fit owes to one kind or the other is paid back here.

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


def scatter_of(
    measured_s: Sequence[float], fitted_s: Sequence[float], groups: int = GROUPS
) -> tuple[float, ...]:
    """Means of the groups, of a kind's steps; () where there are too few to tell."""
    measured, fitted = np.asarray(measured_s, dtype=float), np.asarray(fitted_s, dtype=float)
    if len(measured) < groups:
        return ()
    parts = np.array_split(np.sort(measured / fitted), groups)
    means = np.array([part.mean() for part in parts])
    found: list[float] = (means * (measured.sum() / fitted.sum() / means.mean())).tolist()
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
