"""The modelled executor: sleeps what a cost model says, and produces counts instead of tokens.

A job's length comes with its request (`true_output`, known from a trace): the token drawn at position p is the
(p - num_prompt + 1)-th, so an answer ends with the step that reaches position num_prompt + true_output - 1. Judging by
position and not by a counter makes recomputation after a preemption, migration and aborted plans count right by
themselves. Without a true length an answer never ends here; its replica ends it at max_tokens.

A repeated launch of decodes is one timer for each leg of it. Durations of a leg come from the model all at once and the
instants are summed in the order in which single launches would sum them, so all ways give the same floats:

    ends[i] = ends[i-1] + (scheduler time + seconds of step i)

The first leg is short, since most runs are interrupted early, and each further one doubles what is known.

Scheduler time is charged for each step, from a stored profile, by the plan's num_running and num_waiting. Lanes
run side by side, each at the speed that its share gives it in the cost model. A plan may yield at the boundary of a
layer or operator; both are modelled as equal pieces of its step. Transfers to host memory and back are timed by
sim.wires; a plan that has to wait for some begins when they have ended. A disk takes filings one by one. Nobody guesses
here (sim.drafts does): of a chunk to verify only its own token comes back.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from itertools import repeat as forever
from operator import sub
from typing import TYPE_CHECKING

from msgspec import Struct

from penstock.core.clock import now
from penstock.core.plans import (
    Adapted,
    Count,
    Counted,
    Decodes,
    Filed,
    Filing,
    Moved,
    Plan,
    Transfer,
    Work,
    Yielded,
)
from penstock.core.ports import Completion, Grain
from penstock.core.types import BlockHash, Caps, PlanId, Request
from penstock.cost.step import StepFeatures, StepModel, features_of, layer_segments
from penstock.sim.wires import Wires

if TYPE_CHECKING:
    from penstock.cost.energy import Meter

NEVER = 1 << 62  # a position no job reaches
FIRST_LEG = 24  # steps
OPERATORS_PER_LAYER = 2  # attention block, MLP block: where the real engine can stop

_new_tuple: Callable[[type[StepFeatures], Iterable[object]], StepFeatures] = tuple.__new__
SchedulerTime = Callable[[int, int], float]  # seconds by (num_running, num_waiting)


class _Run(Struct):
    """A launched plan. `ends` are the instants its steps end, as far as they are known; it stops after `target` steps.

    `unending`: the seqs of a plan of decodes none of which ends an answer; empty for all other plans. `parts`:
    what the first step does, an entry for each segment of layers. `extra_s`: scheduler time of each step.
    """

    plan: Plan
    started_at: float
    ends: list[float]
    unending: tuple[int, ...]
    parts: Sequence[StepFeatures]
    target: int
    extra_s: float = 0.0
    timer: asyncio.TimerHandle | None = None
    yielded_at: float | None = None
    paused_s: float = 0.0  # inside the step that runs now


class ModelledExecutor:
    """Runs plans in virtual (or real) time on a StepModel."""

    def __init__(
        self,
        model: StepModel,
        *,
        caps: Caps,
        scheduler: SchedulerTime | None = None,
        meter: Meter | None = None,
        activation_bytes: int = 0,
        templates: Mapping[str, StepModel] | None = None,
    ) -> None:
        """`activation_bytes`: held for each token of a plan that yielded inside its forward.

        `templates`: what a step costs under each intra-step template that a plan may name (`Plan.nano`).
        """
        self._models: dict[str | None, StepModel] = {None: model}
        self._models.update(templates or {})
        self._caps, self._scheduler = caps, scheduler
        self._meter = meter
        self._activation_bytes = activation_bytes
        self._loop: asyncio.AbstractEventLoop | None = (
            None  # asking for the running one takes a system call
        )
        self._tell: Callable[[Completion], None] | None = None
        self._stops: dict[int, int] = {}  # seq -> position whose step draws the last token
        self._runs: dict[PlanId, _Run] = {}
        self._busy: dict[int, PlanId] = {}  # lane -> plan
        has_host = caps.host_blocks > 0 or caps.tier_blocks > 0
        self._wires = Wires(caps.link) if has_host and caps.link is not None else None
        self._moving: dict[int, asyncio.TimerHandle] = {}
        self.disk_block_s = 0.0
        self.found: tuple[tuple[BlockHash, int], ...] = ()  # a modelled disk is empty at first
        self._filing: dict[int, asyncio.TimerHandle] = {}
        self._disk_free_at = 0.0
        self.adapter_load_s = 0.0
        self._loading: dict[int, asyncio.TimerHandle] = {}  # by slot
        self._is_stopped = False

    @property
    def caps(self) -> Caps:
        return self._caps

    @property
    def kv_block_bytes(self) -> int:
        return 0 if self._caps.link is None else self._caps.link.block_bytes

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        self._tell = on_completion

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        caps = self._caps
        assert not self._is_stopped, "launched after stop"
        assert 1 <= repeat <= caps.max_repeat, f"repeat {repeat}"
        assert plan.lane < caps.max_lanes and plan.lane not in self._busy, "no such idle lane"
        assert plan.nano in self._models, f"there is no template {plan.nano!r} of a step"
        if plan.closed:
            self.close_jobs(plan.closed)
        for seq, request, *_ in plan.opened:
            self._stops[seq] = _stop_position(request)
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        run_at = self.ready_at(plan, self._loop.time())
        run = self._begin(plan, run_at, repeat)
        self._busy[plan.lane] = plan.id
        self._runs[plan.id] = run
        run.timer = self._loop.call_at(run.ends[-1], self._arrive, run)
        return plan.id

    def ready_at(self, plan: Plan, at: float) -> float:
        """When a plan that is launched now may begin."""
        return at if self._wires is None else self._wires.ready_at(plan, at)

    def interrupt(self, plan: PlanId, grain: Grain = "step") -> int | None:
        run = self._runs[plan]
        if grain == "step" and run.target == 1:
            return 1
        at = now()
        known = min(run.target, len(run.ends))
        step = bisect_left(run.ends, at, hi=known - 1)  # the step that runs now
        if grain == "step":
            if step + 1 < run.target:
                self._schedule(run, step + 1)
            return run.target
        began, end = (run.ends[step - 1] if step else run.started_at), run.ends[step]
        began += run.paused_s
        pieces = self._caps.num_layers * (OPERATORS_PER_LAYER if grain == "operator" else 1)
        piece_s = (end - began) / pieces
        border = max(0, math.ceil((at - began) / piece_s)) if piece_s > 0 else pieces
        if border >= pieces:
            self._schedule(run, step + 1)
            return run.target
        assert run.timer is not None, "the plan has yielded already"
        run.target = step + 1
        run.timer.cancel()
        yield_at = max(at, began + border * piece_s)
        run.timer = asyncio.get_running_loop().call_at(yield_at, self._yield, run)
        return run.target

    def num_ended(self, plan: PlanId) -> int:
        run = self._runs[plan]
        known = min(run.target, len(run.ends))
        return bisect_left(run.ends, now(), hi=known - 1)

    def resume(self, plan: PlanId) -> None:
        run = self._runs[plan]
        assert run.yielded_at is not None, "the plan has not yielded"
        assert run.plan.lane not in self._busy, "the lane is busy"
        self._busy[run.plan.lane] = plan
        step = run.target - 1
        paused_s = now() - run.yielded_at
        run.paused_s += paused_s
        run.ends[step] += paused_s
        run.yielded_at = None
        self._schedule(run, step + 1)

    def abort(self, plan: PlanId) -> None:
        run = self._runs.pop(plan, None)
        if run is None:
            return
        if run.timer is not None:
            run.timer.cancel()
        if run.yielded_at is None:
            del self._busy[run.plan.lane]

    def close_jobs(self, seqs: Sequence[int]) -> None:
        for seq in seqs:
            self._stops.pop(seq, None)

    def transfer(self, transfer: Transfer) -> None:
        assert not self._is_stopped, "asked for after stop"
        assert self._wires is not None, "this executor has no host memory"
        assert transfer.runs, "a transfer of nothing"
        loop = asyncio.get_running_loop()
        end = self._wires.begin(transfer, loop.time())
        self._moving[transfer.id] = loop.call_at(end, self._moved, transfer.id, end)

    def _moved(self, transfer: int, end: float) -> None:
        del self._moving[transfer]
        assert self._tell is not None, "nobody listens"
        self._tell(Moved(transfer, end))

    def file(self, filing: Filing) -> None:
        assert not self._is_stopped and filing.pairs, "asked for after stop, or for nothing"
        loop = asyncio.get_running_loop()
        end = max(loop.time(), self._disk_free_at) + self.disk_block_s * len(filing.pairs)
        self._disk_free_at = end
        self._filing[filing.id] = loop.call_at(end, self._filed, filing.id, end)

    def _filed(self, filing: int, end: float) -> None:
        del self._filing[filing]
        assert self._tell is not None, "nobody listens"
        self._tell(Filed(filing, end))

    def load_adapter(self, adapter: str, slot: int) -> None:
        assert not self._is_stopped and 0 <= slot < self._caps.max_adapters
        loop = asyncio.get_running_loop()
        end = loop.time() + self.adapter_load_s
        self._loading[slot] = loop.call_at(end, self._adapted, adapter, slot, end)

    def _adapted(self, adapter: str, slot: int, end: float) -> None:
        del self._loading[slot]
        assert self._tell is not None, "nobody listens"
        self._tell(Adapted(adapter, slot, end))

    def take_out(self, seq: int, num_output: int) -> tuple[tuple[int, ...], int | None]:
        """Nothing: the length of an answer goes by its position."""
        return (), None

    async def stop(self) -> None:
        for plan in list(self._runs):
            self.abort(plan)
        for timers in (self._moving, self._filing, self._loading):
            for timer in timers.values():
                timer.cancel()
            timers.clear()
        self._stops.clear()
        self._is_stopped = True

    def _schedule(self, run: _Run, target: int) -> None:
        if run.timer is not None:
            run.timer.cancel()
        run.target = target
        at = run.ends[target - 1]
        run.timer = asyncio.get_running_loop().call_at(at, self._finish, run)

    def _arrive(self, run: _Run) -> None:
        """The last known step has ended: go on, or finish."""
        if len(run.ends) >= run.target:
            self._finish(run)
            return
        known = len(run.ends)
        ahead = run.parts[0].grown(known)
        run.ends += self._leg(run, ahead, min(run.target - known, known))
        assert self._loop is not None, "nothing was launched"
        run.timer = self._loop.call_at(run.ends[-1], self._arrive, run)

    def _leg(self, run: _Run, features: StepFeatures, count: int) -> list[float]:
        """The instants at which the next `count` decode steps end."""
        plan, extra_s = run.plan, run.extra_s
        seconds = self._models[plan.nano].run_seconds(features, count, plan.share)
        if extra_s:
            seconds = [one + extra_s for one in seconds]
        seconds[0] += run.ends[-1] if run.ends else run.started_at
        return list(accumulate(seconds))

    def _finish(self, run: _Run) -> None:
        # They hold each other, and a plan should not wait for the collector of cycles.
        run.timer = None
        plan, steps = run.plan, run.target
        del self._runs[plan.id], self._busy[plan.lane]
        ends = tuple(run.ends if steps == len(run.ends) else run.ends[:steps])
        if self._meter is not None:
            self._measure(self._meter, run, steps)
        assert self._tell is not None, "nobody listens"
        self._tell(Counted(plan.id, steps, self._counts(run, steps), ends))

    def _measure(self, meter: Meter, run: _Run, steps: int) -> None:
        """Tell the meter of a completed launch. Lanes beside each other count by their shares."""
        seconds = (run.ends[steps - 1] - run.started_at - run.paused_s) * run.plan.share
        for part in run.parts:
            of_all = 1.0 if part.layers is None else part.layers / self._caps.num_layers
            meter.add(part, steps, seconds * of_all)

    def _yield(self, run: _Run) -> None:
        run.timer, run.yielded_at = None, now()
        del self._busy[run.plan.lane]
        tokens = sum(work.tokens for work in run.plan.work)
        assert self._tell is not None, "nobody listens"
        self._tell(Yielded(run.plan.id, run.yielded_at, tokens * self._activation_bytes))

    def _begin(self, plan: Plan, at: float, repeat: int) -> _Run:
        """The run of a plan, up to the first step in which an answer ends.

        Written for columns: this and `_counts` happen once a launch and are most of what a simulated step costs.
        """
        extra_s = self._scheduler(plan.num_running, plan.num_waiting) if self._scheduler else 0.0
        work = plan.work
        if not isinstance(work, Decodes) or work.others:
            if repeat == 1:
                return self._begin_mixed(plan, at, extra_s)
            work = _decodes_of(work)
        seqs, starts = work.seqs, work.starts
        num = len(seqs)
        assert num, "a plan without work"
        features = _new_tuple(
            StepFeatures, (num, num, num, num, sum(starts) + num, max(starts) + 1, 0, 0, 0, None)
        )
        left = min(map(sub, map(self._stops.__getitem__, seqs), starts))
        target = max(1, min(left, repeat))
        run = _Run(plan, at, [], seqs if target < left else (), (features,), target, extra_s)
        if target == 1:
            run.ends.append(at + (self._models[plan.nano].seconds(features, plan.share) + extra_s))
        else:
            run.ends = self._leg(run, features, min(target, FIRST_LEG))
        return run

    def _begin_mixed(self, plan: Plan, at: float, extra_s: float) -> _Run:
        assert plan.work, "a plan without work"
        parts = self._parts(plan)
        seconds_of, share = self._models[plan.nano].seconds, plan.share
        if len(parts) == 1:
            seconds = seconds_of(parts[0], share)
        else:
            seconds = math.fsum([seconds_of(part, share) for part in parts])
        return _Run(plan, at, [at + (seconds + extra_s)], (), parts, 1)

    def _parts(self, plan: Plan) -> Sequence[StepFeatures]:
        work = plan.work
        others = work.others if isinstance(work, Decodes) else work
        if any([one.layers is not None for one in others]):
            return layer_segments(tuple(work), self._caps.num_layers)
        pieces = [one[1:4] for one in others]
        if isinstance(work, Decodes):
            pieces += [(start, 1, True) for start in work.starts]
        return (features_of(pieces),)

    def _counts(self, run: _Run, steps: int) -> tuple[Count, ...]:
        if run.unending:
            return tuple(zip(run.unending, forever(steps), forever(False), forever(())))
        # Each further step of a repeated plan is one position further.
        further, stops = steps - 1, self._stops
        counts: list[Count] = []
        others = run.plan.work
        if isinstance(others, Decodes):
            pairs = zip(others.seqs, others.starts, strict=True)
            counts += [(seq, steps, start + steps >= stops[seq], ()) for seq, start in pairs]
            others = others.others
        counts += [
            (seq, steps, start + (1 if phase == "verify" else tokens) + further >= stops[seq], ())
            for seq, start, tokens, samples, _, _, _, phase in others
            if samples
        ]
        return tuple(counts)


def _decodes_of(work: Iterable[Work]) -> Decodes:
    seqs, starts, tokens, samples, _, _, layers, _ = zip(*work, strict=True)
    is_plain = sum(tokens) == len(seqs) and all(samples) and not any(layers)
    assert is_plain, "only sampling decodes are repeated"
    return Decodes(seqs, starts, {})


def _stop_position(request: Request) -> int:
    if request.true_output is None:
        return NEVER
    return request.prompt.num_tokens + max(1, request.true_output) - 1
