"""Drives an executor by hand: a block allocator and a chunk budget, no scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from penstock.core.plans import Done, Opening, Plan, Sampled, Work
from penstock.core.ports import Completion
from penstock.core.prompt import TokenPrompt
from penstock.core.types import PlanId, Request, RequestId, Sampling
from penstock.engine.torch.executor import TorchExecutor

Layers = Mapping[int, tuple[int, int]]
GREEDY = Sampling(temperature=0.0, ignore_eos=True)


@dataclass
class Held:
    seq: int
    request: Request
    answer: int = 0
    computed: int = 0
    outputs: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    is_met: bool = False
    is_fresh: bool = True

    @property
    def known(self) -> int:
        return self.request.prompt.num_tokens + len(self.outputs)


class Driver:
    """`step` plans `tokens` positions for each given job; `finish` runs jobs to `count` tokens each."""

    def __init__(self, executor: TorchExecutor) -> None:
        self.executor = executor
        self.free = list(range(executor.num_blocks))[::-1]
        self.told: asyncio.Queue[Completion] = asyncio.Queue()
        self.plans = 0
        self.seqs = 0
        executor.listen(self.told.put_nowait)

    def job(self, ids: Sequence[int], sampling: Sampling = GREEDY, **more: object) -> Held:
        self.seqs += 1
        answer = int(str(more.pop("answer", 0)))
        request = Request(
            id=RequestId(f"r{self.seqs}"),
            model="m",
            prompt=TokenPrompt(ids),
            sampling=sampling,
            **more,  # type: ignore[arg-type]
        )
        return Held(self.seqs, request, answer)

    def plan(self, parts: Sequence[tuple[Held, int]], layers: Layers = {}) -> Plan:  # noqa: B006
        """`layers` by seq, of the jobs that pass only some."""
        self.plans += 1
        size = self.executor.block_size
        work, opened = [], []
        for job, tokens in parts:
            end = job.computed + tokens
            need = -(-end // size) - len(job.blocks)
            fresh = [self.free.pop() for _ in range(max(0, need))]
            job.blocks += fresh
            if not job.is_met:
                opened.append(Opening(job.seq, job.request, job.answer))
                job.is_met = True
            through = layers.get(job.seq)
            samples = end == job.known and job.request.kind == "generate"
            samples = samples and not self._is_inner(through)
            given = tuple(job.blocks) if job.is_fresh else tuple(fresh)
            work.append(Work(job.seq, job.computed, tokens, samples, given, job.is_fresh, through))
            job.is_fresh = False
        return Plan(id=PlanId(self.plans), work=tuple(work), opened=tuple(opened))

    def _is_inner(self, through: tuple[int, int] | None) -> bool:
        return through is not None and through[1] < self.executor.caps.num_layers

    def apply(self, parts: Sequence[tuple[Held, int]], done: Done, layers: Layers = {}) -> None:  # noqa: B006
        for job, tokens in parts:
            if not self._is_inner(layers.get(job.seq)):
                job.computed += tokens
        by_seq = {job.seq: job for job, _ in parts}
        for out in done.outputs:
            by_seq[out.seq].outputs += out.ids
            by_seq[out.seq].sampled.append(out)

    async def step(self, parts: Sequence[tuple[Held, int]], layers: Layers = {}) -> Done:  # noqa: B006
        self.executor.launch(self.plan(parts, layers))
        done = await asyncio.wait_for(self.told.get(), 60)
        assert isinstance(done, Done)
        if done.error is None:
            self.apply(parts, done, layers)
        return done

    def preempt(self, job: Held) -> None:
        self.free += job.blocks
        job.blocks, job.computed, job.is_fresh = [], 0, True

    def close(self, job: Held) -> None:
        self.free += job.blocks
        self.executor.close_jobs([job.seq])

    async def finish(self, jobs: Sequence[Held], count: int, budget: int = 64) -> None:
        """Steps of at most `budget` tokens, decodes first."""
        while True:
            left = [job for job in jobs if len(job.outputs) < count]
            if not left:
                return
            parts, room = [], budget
            for job in sorted(left, key=lambda job: job.known - job.computed):
                tokens = min(room, job.known - job.computed)
                if tokens:
                    parts.append((job, tokens))
                    room -= tokens
            done = await self.step(parts)
            assert done.error is None, done.error
