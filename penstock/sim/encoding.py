"""A modelled executor with a vision tower: the images of a plan are encoded first, then its work begins.

Both take the whole device, one after the other: nothing is gained by running them at once. The energy of encoding is
not metered.
"""

from __future__ import annotations

from typing import Any

from penstock.core.plans import Plan
from penstock.cost.step import StepModel
from penstock.cost.vision import VisionCost
from penstock.sim.executor import ModelledExecutor, _Run


class EncodingExecutor(ModelledExecutor):
    """See the module's text."""

    def __init__(self, model: StepModel, vision: VisionCost, **more: Any) -> None:
        super().__init__(model, **more)
        self._vision = vision

    def _begin(self, plan: Plan, at: float, repeat: int) -> _Run:
        if not plan.images:
            return super()._begin(plan, at, repeat)
        assert repeat == 1, "images are encoded once"
        seconds = self._vision.seconds([one for _, images in plan.images for one in images])
        if plan.work:
            return super()._begin(plan, at + seconds, 1)
        extra_s = self._scheduler(plan.num_running, plan.num_waiting) if self._scheduler else 0.0
        return _Run(plan, at, [at + (seconds + extra_s)], (), (), 1, extra_s)
