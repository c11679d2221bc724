"""The modelled executor with several lanes: those that run side by side slow each other down (cost.sharing).

Whenever a lane begins or ends, the speeds of all that run are found anew, and what is left of each is stretched: an
end that was `d` seconds away at speed v is d * v / w away at speed w. Everything else is the executor's; one with a
single lane knows nothing of this.
"""

from __future__ import annotations

from penstock.core.clock import now
from penstock.core.plans import Plan
from penstock.core.ports import Grain
from penstock.core.types import Caps, PlanId
from penstock.cost.energy import Meter
from penstock.cost.sharing import Load, Sharing, speeds
from penstock.cost.step import StepFeatures, StepModel
from penstock.sim.executor import ModelledExecutor, SchedulerTime, _Run


class LanedExecutor(ModelledExecutor):
    """`bytes_per_s`: what the memory of all devices together gives at best."""

    def __init__(
        self,
        model: StepModel,
        *,
        caps: Caps,
        sharing: Sharing,
        bytes_per_s: float,
        scheduler: SchedulerTime | None = None,
        meter: Meter | None = None,
    ) -> None:
        super().__init__(model, caps=caps, scheduler=scheduler, meter=meter)
        self._sharing, self._bytes_per_s = sharing, bytes_per_s
        self._speed: dict[PlanId, float] = {}
        self._loads: dict[PlanId, Load] = {}
        self._leaving: set[PlanId] = set()  # about to yield inside their step: not stretched

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        super().launch(plan, repeat)
        parts = self._runs[plan.id].parts
        self._speed[plan.id] = 1.0
        self._loads[plan.id] = Load(self._models[plan.nano], parts, plan.share, self._bytes_per_s)
        self._settle()
        return plan.id

    def interrupt(self, plan: PlanId, grain: Grain = "step") -> int | None:
        steps = super().interrupt(plan, grain)
        if grain != "step":
            self._leaving.add(plan)
        return steps

    def resume(self, plan: PlanId) -> None:
        super().resume(plan)
        self._settle()

    def abort(self, plan: PlanId) -> None:
        super().abort(plan)
        self._forget(plan)

    def _finish(self, run: _Run) -> None:
        super()._finish(run)
        self._forget(run.plan.id)

    def _yield(self, run: _Run) -> None:
        super()._yield(run)
        self._leaving.discard(run.plan.id)
        self._settle()

    def _leg(self, run: _Run, features: StepFeatures, count: int) -> list[float]:
        ends = super()._leg(run, features, count)
        speed = self._speed.get(run.plan.id, 1.0)
        if speed == 1.0:
            return ends
        first = run.ends[-1] if run.ends else run.started_at
        return [first + (end - first) / speed for end in ends]

    def _forget(self, plan: PlanId) -> None:
        for known in (self._speed, self._loads):
            known.pop(plan, None)
        self._leaving.discard(plan)
        self._settle()

    def _settle(self) -> None:
        """Who runs beside whom has changed."""
        plans = list(self._busy.values())
        found = speeds(self._sharing, [self._loads[plan] for plan in plans])
        for plan, speed in zip(plans, found, strict=True):
            if speed != self._speed[plan] and plan not in self._leaving:
                self._stretch(self._runs[plan], self._speed[plan] / speed)
                self._speed[plan] = speed

    def _stretch(self, run: _Run, by: float) -> None:
        at = now()
        run.ends = [end if end <= at else at + (end - at) * by for end in run.ends]
        assert run.timer is not None and self._loop is not None, "a lane that runs has a timer"
        run.timer.cancel()
        due = run.ends[min(run.target, len(run.ends)) - 1]
        run.timer = self._loop.call_at(due, self._arrive, run)
