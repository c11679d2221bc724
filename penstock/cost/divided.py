"""What a step costs on several devices, each with a part of its rows and of the experts.

Data and expert parallel: every device reads the weights of attention whole and takes an even part of the tokens, jobs
and contexts. Whoever makes it prices a device with its part of the experts: as many rows then choose among them as all
rows choose among all. What devices send each other is not charged, and a single prompt is cut like many.
"""

from __future__ import annotations

from penstock.cost.step import StepCost, StepFeatures, StepModel


class Divided:
    """A StepModel of `devices` of what `one` prices."""

    def __init__(self, one: StepModel, devices: int) -> None:
        assert devices >= 1, "no devices"
        self._one, self._devices = one, devices

    @property
    def name(self) -> str:
        return f"{self._devices} x {self._one.name}"

    @property
    def digest(self) -> str:
        return f"{self._one.digest}/{self._devices}"

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        return self._one.seconds(self._part(features), share)

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        return [self.seconds(features.grown(step), share) for step in range(count)]

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost:
        """Of one device."""
        return self._one.step(self._part(features), share)

    def _part(self, whole: StepFeatures) -> StepFeatures:
        """Of the device that has most."""
        n = self._devices
        return StepFeatures(
            num_tokens=-(-whole.num_tokens // n),
            num_jobs=-(-whole.num_jobs // n),
            num_samples=-(-whole.num_samples // n),
            num_decodes=-(-whole.num_decodes // n),
            decode_context=-(-whole.decode_context // n),
            max_decode_context=whole.max_decode_context,
            num_prefills=-(-whole.num_prefills // n),
            prefill_pairs=-(-whole.prefill_pairs // n),
            prefill_context=-(-whole.prefill_context // n),
            layers=whole.layers,
        )
