"""Layered prefill and FlowPrefill in a whole replica on the real engine: a policy never changes the text.

What policies of the same name promise in virtual time is tested elsewhere; here hidden states, activations and blocks
are real, and the replica holds every decision to its law.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.core.events import Event, Finished, Stepped, Suspended
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling, Slo, TokenLogprob
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.torch.open import EngineConfig, open_executor
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy import find
from tests.engine.torch.models import saved
from tests.engine.torch.served import NoPredictions

SHARED = tuple(range(30, 80))
PROMPTS = [
    *[tuple(range(3, 3 + size)) for size in (1, 15, 16, 17, 40, 130)],
    SHARED,
    tuple(range(200, 290)),
    (*SHARED, 7, 8, 9),
    (*SHARED[:33], 4),
]
GREEDY = Sampling(temperature=0.0, ignore_eos=True, max_tokens=24)
LONG = tuple(range(5, 455))


class Live:
    """One replica on the real engine; texts and events of what it served."""

    def __init__(
        self,
        folder: Path,
        batch: object,
        order: str,
        num_blocks: int,
        *,
        evict: str = "recompute-last",
        **engine: object,
    ) -> None:
        told: dict[str, object] = {"device": "cpu", "dtype": "fp32", "threads": 1}
        config = EngineConfig(num_blocks=num_blocks, **told | engine)  # type: ignore[arg-type]
        self.executor = executor = open_executor(str(folder), config)
        self.events: list[Event] = []
        self.texts: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprob]] = {}
        self.reasons: dict[str, str] = {}
        nobody = NoPredictions()
        self.replica = Replica(
            ReplicaConfig(num_blocks=num_blocks, is_checked=True),
            executor,
            ReplicaPolicies(
                order=find("order", order)(),
                admit=find("admit", "watermark")(),
                batch=batch,  # type: ignore[arg-type]
                evict=find("evict", evict)(),
                blocks=find("evict", "lru")(),
            ),
            Predictors(cost=nobody, lengths=nobody),
            log=self,
            on_outputs=self._hear,
        )
        self._run = asyncio.get_running_loop().create_task(self.replica.run())

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def _hear(self, outputs: tuple[tuple[str, Output], ...]) -> None:
        for name, output in outputs:
            self.texts.setdefault(name, []).extend(output.ids)
            self.logprobs.setdefault(name, []).extend(output.logprobs)
            if output.finish is not None:
                self.reasons[name] = output.finish

    def ask(
        self,
        name: str,
        ids: tuple[int, ...],
        within_s: float | None = None,
        sampling: Sampling = GREEDY,
    ) -> None:
        slo = Slo(ttft_s=within_s)
        self.replica.submit(
            Request(
                id=RequestId(name), model="m", prompt=TokenPrompt(ids), sampling=sampling, slo=slo
            )
        )

    async def end(self) -> dict[str, list[int]]:
        async with asyncio.timeout(60):
            await self.replica.drain()
        await self.replica.stop()
        await self._run
        return self.texts

    def runs_a_prompt_of(self, tokens: int) -> bool:
        plans = [flight.plan for flight in self.replica._flights.running.values()]
        return any(work.tokens >= tokens for plan in plans for work in plan.work)

    def of(self, kind: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0)


@pytest.mark.slow  # test_policies_keep_the_text.py plays it with a smaller model
@pytest.mark.parametrize("name", ["llama-8", "qwen3-moe-8"])
async def test_layered_prefill(model_root: Path, name: str) -> None:
    """Shared prefixes, rounds of several prompts, prompts of several rounds, and too few blocks for all."""
    folder, _ = saved(model_root, name)
    layered = find("batch", "layered")(round_tokens=100, group_tokens=16, max_groups=4)
    texts = []
    for batch, num_blocks in ((find("batch", "vllm-v1")(), 256), (layered, 26)):
        live = Live(folder, batch, "fcfs", num_blocks)
        for place, ids in enumerate(PROMPTS):
            live.ask(str(place), ids)
        texts.append(await live.end())
    assert texts[0] == texts[1]
    ended = [event for event in live.of(Finished) if isinstance(event, Finished)]
    assert sum(event.num_preemptions for event in ended) > 0
    assert sum(event.num_cached for event in ended) > 0
    steps = [event for event in live.of(Stepped) if isinstance(event, Stepped)]
    chunks = Counter(chunk for step in steps for chunk in step.chunks)
    assert max(times for (_, tokens), times in chunks.items() if tokens > 16) == 4  # four groups


@pytest.mark.parametrize("name", ["llama-8", pytest.param("qwen3-moe-8", marks=pytest.mark.slow)])
async def test_flow_prefill(model_root: Path, name: str) -> None:
    """Short prompts stop long ones inside their forward; one long request is cancelled while it is suspended."""
    folder, _ = saved(model_root, name)
    asks = [(f"long {at}", LONG[at : 400 + at]) for at in range(3)]
    asks += [(f"short {at}", PROMPTS[at]) for at in range(6)]
    plain = Live(folder, find("batch", "vllm-v1")(), "fcfs", 256)
    for who, ids in asks:
        plain.ask(who, ids)
    want = await plain.end()
    live = Live(folder, find("batch", "flow-prefill")(batch_tokens=64), "slack-edf", 256)
    for who, ids in asks[:3]:
        live.ask(who, ids, 1000.0)
    for at, (who, ids) in enumerate(asks[3:]):
        if at < 2:
            await until(lambda: live.runs_a_prompt_of(400))
        live.ask(who, ids, 10.0)
        if at < 2:
            await until(lambda count=at + 1: len(live.of(Suspended)) >= count)
        if at == 0:
            live.replica.cancel("long 0")
    got = await live.end()
    assert len(live.of(Suspended)) >= 2
    assert {who: ids for who, ids in got.items() if who != "long 0"} == {
        who: ids for who, ids in want.items() if who != "long 0"
    }
    assert live.replica.ledger.free == 256
    assert live.replica._executor._lanes[0]._left == {}  # type: ignore[attr-defined]
