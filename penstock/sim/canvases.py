"""The modelled executor of diffusion language models: sleeps what a step in mixed phases costs, and counts.

A block is resolved after as many steps as its rule has (early ends by confidence are not modelled) and then tells its
tokens all at once. A job's length comes with its request (`true_output`): its last block tells what is left of it and
ends the answer; without one the answer ends when the canvas is full. One lane, one plan at a time, never left inside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.core.plans import Done, Plan, Sampled, Work
from penstock.core.ports import Completion, Grain
from penstock.core.types import CanvasRule, Caps, PlanId
from penstock.cost.diffusion import CanvasPiece
from penstock.sim.executor import SchedulerTime


class Price(Protocol):
    def seconds(self, pieces: Iterable[CanvasPiece]) -> float: ...


@dataclass(slots=True)
class _Answer:
    """`canvas`: positions in all, told by its first step. `told`: tokens of blocks that are resolved."""

    num_prompt: int
    true_output: int | None
    canvas: int = 0
    told: int = 0
    step: int = 0

    def block(self, rule: CanvasRule) -> int:
        return min(rule.block_tokens, self.canvas - self.num_prompt - self.told)


class ModelledCanvases:
    """See the module's text. `caps.canvas` is the rule."""

    def __init__(self, price: Price, *, caps: Caps, scheduler: SchedulerTime | None = None) -> None:
        assert caps.canvas is not None, "an executor of canvases has a rule"
        self._scheduler = scheduler
        self._price, self._caps, self._rule = price, caps, caps.canvas
        self._tell: Callable[[Completion], None] | None = None
        self._answers: dict[int, _Answer] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._plan: PlanId | None = None
        self._is_stopped = False

    @property
    def caps(self) -> Caps:
        return self._caps

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        self._tell = on_completion

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        assert not self._is_stopped, "launched after stop"
        assert self._plan is None and plan.lane == 0, "the lane is busy"
        self.close_jobs(plan.closed)
        for seq, request, *_ in plan.opened:
            self._answers[seq] = _Answer(request.prompt.num_tokens, request.true_output)
        seconds = self._price.seconds([self._piece(work) for work in plan.work])
        if self._scheduler is not None:
            seconds += self._scheduler(plan.num_running, plan.num_waiting)
        loop = asyncio.get_running_loop()
        self._plan = plan.id
        self._timer = loop.call_at(loop.time() + seconds, self._finish, plan)
        return plan.id

    def interrupt(self, plan: PlanId, grain: Grain = "step") -> None:
        """A plan is one step: it ends soon enough."""

    def resume(self, plan: PlanId) -> None:
        raise AssertionError("plans of canvases are never suspended")

    def abort(self, plan: PlanId) -> None:
        if plan == self._plan and self._timer is not None:
            self._timer.cancel()
            self._plan = self._timer = None

    def close_jobs(self, seqs: Sequence[int]) -> None:
        for seq in seqs:
            self._answers.pop(seq, None)

    async def stop(self) -> None:
        self._is_stopped = True
        if self._plan is not None:
            self.abort(self._plan)

    def _piece(self, work: Work) -> CanvasPiece:
        answer = self._answers[work.seq]
        if work.is_fresh:
            answer.canvas, answer.step = work.tokens, 0
        assert work.phase == self._rule.phase(answer.step), f"job {work.seq} is at another step"
        block = answer.block(self._rule)
        return CanvasPiece(
            work.phase, work.tokens, block, self._rule.num_kept(answer.canvas - block)
        )

    def _finish(self, plan: Plan) -> None:
        self._plan = self._timer = None
        outputs = [self._advance(work.seq, self._answers[work.seq]) for work in plan.work]
        assert self._tell is not None, "nobody listens"
        at = asyncio.get_running_loop().time()
        self._tell(Done(plan.id, 1, tuple([one for one in outputs if one is not None]), (at,)))

    def _advance(self, seq: int, answer: _Answer) -> Sampled | None:
        answer.step += 1
        block = answer.block(self._rule)
        if answer.step < min(self._rule.steps, block):
            return None
        left = block if answer.true_output is None else answer.true_output - answer.told
        tokens = max(1, min(block, left))
        answer.told, answer.step = answer.told + block, 0
        return Sampled(seq, tokens, (), left <= block and answer.true_output is not None)
