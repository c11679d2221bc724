"""The part of the executor port that is the same wherever a plan is one step of one lane, never left in the middle."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from penstock.core.plans import Done, Plan
from penstock.core.ports import Completion, Grain
from penstock.core.types import Caps, PlanId
from penstock.engine.torch.lane import Abort, Close, Lane, Launch, Step


class WholeSteps(ABC):
    """Implements core.ports.Executor, but for `_step` and `_close`, which run on the lane's thread."""

    def __init__(self, caps: Caps, *, threads: int | None) -> None:
        self._caps = caps
        self._live: set[PlanId] = set()
        self._on_completion: Callable[[Completion], None] | None = None
        self._lane = Lane(run=self._step, close=self._close, tell=self._tell, threads=threads)
        self._is_stopped = False

    @property
    def caps(self) -> Caps:
        return self._caps

    @property
    def pids(self) -> list[int]:
        """Processes besides this one."""
        return []

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        self._on_completion = on_completion

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        assert not self._is_stopped, "launched after stop"
        self._live.add(plan.id)
        self._lane.send(Launch(plan))
        return plan.id

    def interrupt(self, plan: PlanId, grain: Grain = "step") -> None:  # noqa: B027 - nothing to do is the answer
        """A plan is one step: it ends soon enough."""

    def resume(self, plan: PlanId) -> None:
        raise AssertionError("a plan of whole steps is never suspended")

    def abort(self, plan: PlanId) -> None:
        if plan in self._live:
            self._live.discard(plan)
            self._lane.mark(plan, "abort")
            self._lane.send(Abort(plan))

    def close_jobs(self, seqs: Sequence[int]) -> None:
        self._lane.send(Close(tuple(seqs)))

    async def stop(self) -> None:
        if not self._is_stopped:
            self._is_stopped = True
            await self._lane.stop(tuple(self._live))
            self._live.clear()

    def _tell(self, told: Completion) -> None:
        """On the loop's thread: pass on what the lane did, unless the plan was aborted meanwhile."""
        assert isinstance(told, Done), "a step is never left in the middle"
        if told.plan not in self._live:
            return
        self._live.discard(told.plan)
        self._lane.unmark(told.plan)
        at = asyncio.get_running_loop().time()
        assert self._on_completion is not None, "nobody listens"
        self._on_completion(Done(told.plan, 1, told.outputs, (at,), told.error))

    @abstractmethod
    def _close(self, seqs: Iterable[int]) -> None:
        """Forget these jobs."""

    @abstractmethod
    def _step(self, plan: Plan) -> Step:
        """Run one plan."""
