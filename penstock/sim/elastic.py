"""A modelled replica that gets more or fewer devices while it serves.

A change takes `reshape_s`, during which steps go on as before; from then on they take the time of a model of so many
devices. What runs when it ends is told to end with its step. Where `stops` is set nothing begins meanwhile: a restart,
but for what it would forget, so it is modelled better than it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from penstock.core.clock import now
from penstock.core.plans import Plan
from penstock.core.reshaping import NewShape, Placing
from penstock.cost.step import StepModel
from penstock.sim.executor import ModelledExecutor

ModelOf = Callable[[int], StepModel]


class ElasticExecutor(ModelledExecutor):
    """Implements core.reshaping.Reshaper too. `model_of` gives the step times of a number of devices."""

    def __init__(
        self, model_of: ModelOf, devices: int, *, reshape_s: float, stops: bool, **more: Any
    ) -> None:
        super().__init__(model_of(devices), **more)
        self._model_of, self._devices = model_of, devices
        self._reshape_s, self._restarts = reshape_s, stops
        self._idle_until = 0.0

    async def reshape(self, devices: int, placing: Placing) -> NewShape:
        """See core.reshaping.Reshaper."""
        was = self._devices
        if devices == was:
            return NewShape(was, devices)
        model = self._model_of(devices)
        if self._restarts:
            self._idle_until = now() + self._reshape_s
            self._end_steps()
        await asyncio.sleep(self._reshape_s)
        self._devices, self._models[None] = devices, model
        self._end_steps()
        return NewShape(was, devices)

    def ready_at(self, plan: Plan, at: float) -> float:
        return max(super().ready_at(plan, at), self._idle_until)

    def _end_steps(self) -> None:
        for plan, run in list(self._runs.items()):
            if run.yielded_at is None:
                self.interrupt(plan)
