"""An executor for tests: every step takes one second, answers end at their true length, calls are recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from penstock.core.plans import Done, Plan, Sampled
from penstock.core.ports import Completion, Grain
from penstock.core.types import Caps, PlanId, Request


class SteadyExecutor:
    def __init__(self, **caps: int) -> None:
        self.caps = Caps(num_layers=2, **{"max_context": 4096, **caps})  # type: ignore[arg-type]
        self.launched: list[tuple[Plan, int]] = []
        self.requests: dict[int, Request] = {}
        self.produced: dict[int, int] = {}
        self.closed: list[int] = []
        self.is_stopped = False

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        self._on_completion = on_completion

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        self.launched.append((plan, repeat))
        for seq, request, *_ in plan.opened:
            assert seq not in self.requests, "a job is opened twice"
            self.requests[seq] = request
            self.produced[seq] = 0
        self.closed.extend(plan.closed)
        asyncio.get_running_loop().call_later(1.0, self._finish, plan)
        return plan.id

    def _finish(self, plan: Plan) -> None:
        if self.is_stopped:
            return
        outputs = []
        for work in plan.work:
            if work.samples:
                self.produced[work.seq] += 1
                is_stop = self.produced[work.seq] == self.requests[work.seq].true_output
                outputs.append(Sampled(work.seq, 1, (), is_stop))
        self._on_completion(Done(plan.id, 1, tuple(outputs), (asyncio.get_running_loop().time(),)))

    def interrupt(self, plan: PlanId, grain: Grain = "step") -> None: ...

    def resume(self, plan: PlanId) -> None: ...

    def abort(self, plan: PlanId) -> None: ...

    def close_jobs(self, seqs: Sequence[int]) -> None:
        self.closed.extend(seqs)

    async def stop(self) -> None:
        self.is_stopped = True
