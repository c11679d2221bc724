"""Measures what a step costs on a real executor, and what deciding one costs in a replica.

Steps: scenarios of a batch size and a context run straight on the executor port, without a scheduler. Each prefills its
jobs in chunks, then decodes them together, then decodes them beside a chunk of a newcomer, so that all terms of a fit
vary by themselves. Every scenario is run `rounds` times and of equal steps the fastest counts: what a busy machine adds
is never negative, and a fit should speak of the executor and not of its neighbours.

Scheduling: a replica with the policies at hand runs on an executor that answers at once, with so many jobs
running and so many waiting; the time from a completion to the next launch is all its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from penstock.core.clock import now
from penstock.core.errors import StepFailed
from penstock.core.events import Event
from penstock.core.plans import Done, Opening, Plan, Sampled, Work
from penstock.core.ports import Completion, Executor, Grain
from penstock.core.prompt import TokenPrompt, TracedPrompt
from penstock.core.types import Caps, PlanId, Request, RequestId, Sampling
from penstock.cost.fitted import solve_nonnegative
from penstock.cost.profile import SchedulerCost
from penstock.cost.step import StepFeatures, features_of
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors, ReplicaPolicies

NUM_DECODES = 4  # decode steps measured in each scenario, and as many beside a newcomer


class Measurable(Executor, Protocol):
    """An executor with real blocks."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...


class MeasuredStep(NamedTuple):
    features: StepFeatures
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is measured: prompts of `contexts` tokens in chunks of `chunks`, by `batches` jobs at once."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    contexts: tuple[int, ...] = (16, 128, 512, 1024)
    chunks: tuple[int, ...] = (32, 128, 512)
    rounds: int = 3

    def fitting(self, max_context: int, max_positions: int) -> Iterator[tuple[int, int, int]]:
        """(batch, context, chunk) of the scenarios that fit: each chunk size once with every batch and context."""
        spare = 2 * NUM_DECODES + 1
        scenarios = [(batch, context) for batch in self.batches for context in self.contexts]
        for index, (batch, context) in enumerate(scenarios):
            fits_memory = (batch + 1) * (context + spare + 16) <= max_positions
            if context + spare <= max_context and fits_memory:
                yield batch, context, self.chunks[index % len(self.chunks)]


@dataclass(slots=True)
class _Held:
    """A job of a scenario and the blocks it may use."""

    seq: int
    size: int
    blocks: tuple[int, ...]
    position: int = 0


class StepMeter:
    """Runs plans on an executor by hand and times them."""

    def __init__(self, executor: Measurable, vocab_size: int) -> None:
        self._executor, self._vocab_size = executor, vocab_size
        self._done: asyncio.Future[Completion] | None = None
        self._num_plans = 0
        self._next_seq = 0
        executor.listen(self._hear)

    def _hear(self, completion: Completion) -> None:
        assert self._done is not None
        self._done.set_result(completion)

    async def scenario(self, batch: int, context: int, chunk: int) -> list[MeasuredStep]:
        """Prefill, decode, decode beside a newcomer; the jobs are closed in the end."""
        jobs = self._jobs(batch + 1, context)
        *crowd, newcomer = jobs
        steps = []
        for job in crowd:
            while job.position < context:
                steps.append(await self._step([(job, min(chunk, context - job.position))]))
        steps += [await self._step([(job, 1) for job in crowd]) for _ in range(NUM_DECODES)]
        for _ in range(NUM_DECODES):
            left = min(chunk, context - newcomer.position)
            beside = [(newcomer, left)] if left else []
            steps.append(await self._step([(job, 1) for job in crowd] + beside))
        self._executor.close_jobs([job.seq for job in jobs])
        return steps

    def _jobs(self, count: int, context: int) -> list[_Held]:
        each = -(-(context + 2 * NUM_DECODES + 1) // self._executor.block_size)
        first = self._next_seq
        self._next_seq += count
        return [
            _Held(first + i, context, tuple(range(i * each, (i + 1) * each))) for i in range(count)
        ]

    async def _step(self, pieces: Sequence[tuple[_Held, int]]) -> MeasuredStep:
        work, opened = [], []
        for job, tokens in pieces:
            is_new = job.position == 0
            samples = job.position + tokens >= job.size
            blocks = job.blocks if is_new else ()
            work.append(Work(job.seq, job.position, tokens, samples, blocks, is_new))
            if is_new:
                opened.append(Opening(job.seq, self._request(job), 0))
            job.position += tokens
        self._num_plans += 1
        self._done = asyncio.get_running_loop().create_future()
        began_at = now()
        self._executor.launch(Plan(PlanId(self._num_plans), tuple(work), tuple(opened)))
        done = await self._done
        assert isinstance(done, Done)
        errors = [done.error, *(one.error for one in done.outputs)]
        if any(errors):
            raise StepFailed(f"a step to be measured failed: {next(filter(None, errors))}")
        features = features_of([item[1:4] for item in work])
        return MeasuredStep(features, done.ends[-1] - began_at)

    def _request(self, job: _Held) -> Request:
        ids = [(17 * job.seq + 31 * i) % self._vocab_size for i in range(job.size)]
        return Request(
            id=RequestId(f"measured-{job.seq}"),
            model="measured",
            prompt=TokenPrompt(ids),
            sampling=Sampling(temperature=0.0, max_tokens=1 << 20, ignore_eos=True),
        )


async def measure_steps(
    executor: Measurable,
    vocab_size: int,
    grid: Grid,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[MeasuredStep]:
    """All steps of the grid, the fastest of their rounds. Raises StepFailed when the executor fails one."""
    meter = StepMeter(executor, vocab_size)
    max_positions = executor.num_blocks * executor.block_size
    scenarios = list(grid.fitting(executor.caps.max_context, max_positions))
    if scenarios:
        await meter.scenario(*scenarios[0])  # warms caches and allocators; not counted
    found: list[MeasuredStep] = []
    for number, scenario in enumerate(scenarios):
        rounds = [await meter.scenario(*scenario) for _ in range(grid.rounds)]
        for same in zip(*rounds, strict=True):
            found.append(min(same, key=lambda step: step.seconds))
        if on_progress is not None:
            on_progress(number + 1, len(scenarios))
    return found


class InstantExecutor:
    """Answers every plan on the next turn of the loop: what is left of a step is its replica's own time."""

    def __init__(self) -> None:
        self.caps = Caps(num_layers=1, max_context=1 << 20)
        self.num_steps = 0
        self._tell: Callable[[Completion], None] | None = None

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        self._tell = on_completion

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        outputs = tuple(Sampled(work.seq, 1) for work in plan.work if work.samples)
        asyncio.get_running_loop().call_soon(self._finish, plan.id, outputs)
        return plan.id

    def _finish(self, plan: PlanId, outputs: tuple[Sampled, ...]) -> None:
        self.num_steps += 1
        assert self._tell is not None
        self._tell(Done(plan, 1, outputs, (now(),)))

    def interrupt(self, plan: PlanId, grain: Grain = "step") -> None:
        """Nothing runs long enough to be interrupted."""

    def resume(self, plan: PlanId) -> None:
        raise AssertionError("nothing yields here")

    def abort(self, plan: PlanId) -> None:
        self._tell = lambda completion: None

    def close_jobs(self, seqs: Sequence[int]) -> None:
        """Nothing is kept of jobs."""

    async def stop(self) -> None:
        self._tell = lambda completion: None


class _Unheard:
    def emit(self, event: Event) -> None:
        pass


async def measure_scheduler(
    open_policies: Callable[[int], ReplicaPolicies],
    predictors: Predictors,
    *,
    running: Sequence[int] = (1, 8, 32, 128),
    waiting: Sequence[int] = (0, 32, 256),
    steps: int = 40,
) -> SchedulerCost:
    """Seconds a step by jobs running and waiting. `open_policies(max_jobs)` makes fresh policies for so many."""
    table, seconds = [], []
    for num_running in running:
        for num_waiting in waiting:
            policies = open_policies(num_running)
            took = await _seconds_a_step(policies, predictors, (num_running, num_waiting), steps)
            table.append((1.0, float(num_running), float(num_waiting)))
            seconds.append(took)
    weights = 1.0 / np.array(seconds)
    found = solve_nonnegative(np.array(table) * weights[:, None], np.ones(len(seconds)))
    fixed_s, per_running_s, per_waiting_s = found.tolist()
    return SchedulerCost(
        fixed_s=fixed_s,
        per_running_s=per_running_s,
        per_waiting_s=per_waiting_s,
        num_steps=len(seconds) * steps,
    )


async def _seconds_a_step(
    policies: ReplicaPolicies, predictors: Predictors, jobs: tuple[int, int], steps: int
) -> float:
    """The median of a few stretches of steps with so many (running, waiting) jobs."""
    num_running, num_waiting = jobs
    executor = InstantExecutor()
    config = ReplicaConfig(num_blocks=1 << 16, block_size=16)
    replica = Replica(config, executor, policies, predictors, log=_Unheard())
    for number in range(num_running + num_waiting):
        request = Request(
            id=RequestId(f"{number}"),
            model="measured",
            prompt=TracedPrompt(16),
            sampling=Sampling(max_tokens=1 << 16),
        )
        replica.submit(request, every_token=True)
    stretches = []
    for stretch in range(6):
        began_at, until = now(), executor.num_steps + steps // 5
        while executor.num_steps < until:
            await asyncio.sleep(0)
        if stretch:  # the first admits and prefills
            stretches.append((now() - began_at) / (steps // 5))
    await replica.stop()
    return float(np.median(stretches))
