"""Measures what a step costs on a real executor.

Scenarios of a batch size and a context run straight on the executor port, without a scheduler. Each prefills its
jobs in chunks, then decodes them together, then decodes them beside a chunk of a newcomer, so that all terms of a fit
vary by themselves. Every scenario is run `rounds` times and of equal steps the fastest counts: what a busy machine adds
is never negative, and a fit should speak of the executor and not of its neighbours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from penstock.core.clock import now
from penstock.core.errors import StepFailed
from penstock.core.plans import Done, Opening, Plan, Work
from penstock.core.ports import Completion, Executor
from penstock.core.prompt import TokenPrompt
from penstock.core.types import PlanId, Request, RequestId, Sampling
from penstock.cost.step import StepFeatures, features_of

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
