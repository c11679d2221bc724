"""A real replica on a real executor, for one test: prompts in, token ids out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from penstock.core.events import Drafted, Event, Finished
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.swap import Store, SwapConfig
from penstock.engine.torch.drafts import Drafter
from penstock.engine.torch.open import EngineConfig, open_executor
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy.admit.watermark import Watermark
from penstock.policy.batch import Policy
from penstock.policy.batch.speculative import Speculative
from penstock.policy.batch.vllm_v1 import VllmV1
from penstock.policy.evict.lru import Lru
from penstock.policy.evict.recompute_last import RecomputeLast
from penstock.policy.order.fcfs import Fcfs


class NoPredictions:
    def predict(self, chunks: object, share: float = 1.0) -> float:
        return 1.0

    def quantile(self, job: object, q: float) -> int:
        return 1

    def quantiles(self, jobs: Sequence[object], q: float) -> list[int]:
        return [1] * len(jobs)

    def sample(self, job: object, u: float) -> int:
        return 1


@dataclass
class Served:
    """What a run left behind. `outputs[i]` are those of request i, in the order they came."""

    outputs: list[list[Output]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def ids(self, request: int, answer: int = 0) -> list[int]:
        return [i for out in self.outputs[request] if out.answer == answer for i in out.ids]

    @property
    def guesses(self) -> tuple[int, int]:
        """(verified, right)."""
        told = [one for event in self.events if isinstance(event, Drafted) for one in event.guesses]
        return sum(drafted for _, drafted, _ in told), sum(right for _, _, right in told)

    @property
    def num_preemptions(self) -> int:
        return sum(event.num_preemptions for event in self.events if isinstance(event, Finished))

    @property
    def num_cached(self) -> int:
        return sum(event.num_cached for event in self.events if isinstance(event, Finished))


@dataclass(frozen=True, kw_only=True)
class Setting:
    budget: int = 64
    has_prefix_cache: bool = True
    store: Store = "hash"
    num_blocks: int = 256
    is_alone: bool = False  # one request at a time
    policies: ReplicaPolicies | None = None  # None: vLLM's
    swap: SwapConfig = SwapConfig()
    drafts: int | None = None  # guesses of a job in a step; None: nobody plans any
    drafter: Drafter | None = None  # instead of the engine's own

    def batch(self) -> Policy:
        planner = VllmV1(max_tokens=self.budget)
        if self.drafts is None:
            return planner
        guessing = Speculative(max_drafts=self.drafts)
        guessing.wrap(planner)
        return guessing


async def serve(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    setting: Setting,
    *,
    sampling: Sequence[Sampling],
    engine: EngineConfig,
    adapters: Sequence[str | None] = (),
) -> Served:
    executor = open_executor(str(folder), engine)
    if setting.drafter is not None:
        executor.drafter = setting.drafter
    served = Served([[] for _ in prompts])
    nobody = NoPredictions()

    def hear(items: tuple[tuple[str, Output], ...]) -> None:
        for name, output in items:
            served.outputs[int(name)].append(output)

    replica = Replica(
        ReplicaConfig(
            num_blocks=executor.num_blocks,
            block_size=executor.block_size,
            has_prefix_cache=setting.has_prefix_cache,
            store=setting.store,
            is_checked=True,
            swap=setting.swap,
        ),
        executor,
        setting.policies
        or ReplicaPolicies(
            order=Fcfs(),
            admit=Watermark(),
            batch=setting.batch(),
            evict=RecomputeLast(),
            blocks=Lru(),
        ),
        Predictors(cost=nobody, lengths=nobody),
        log=served,
        on_outputs=hear,
    )
    running = asyncio.get_running_loop().create_task(replica.run())
    for at, ids in enumerate(prompts):
        adapter = adapters[at] if adapters else None
        request = Request(
            id=RequestId(str(at)),
            model="m",
            prompt=TokenPrompt(ids, adapter=adapter),
            sampling=sampling[at],
            adapter=adapter,
        )
        replica.submit(request)
        while setting.is_alone and not any(out.finish for out in served.outputs[at]):
            await asyncio.sleep(0.001)
    while not all(any(out.finish for out in outputs) for outputs in served.outputs):
        await asyncio.sleep(0.002)
        if running.done():
            break
    await replica.stop()
    await running
    return served
