"""Admission by future memory on the real engine: fewer preemptions than full fit, and the very same text."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from penstock.core.events import Completed, Event, Finished
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling
from penstock.cost.fitted import Fitted
from penstock.cost.lengths import History, RecentLengths
from penstock.cost.predict import StepPredictor
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.torch.open import EngineConfig, open_executor
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy import find
from tests.engine.torch.models import saved

NUM, MOST = 50, 120
ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=28)


def requests() -> list[Request]:
    """Answers end at a chance of about one in forty a token, or at MOST."""
    rng = random.Random(2)
    return [
        Request(
            id=RequestId(str(place)),
            model="m",
            prompt=TokenPrompt([rng.randrange(10, 200) for _ in range(rng.randrange(4, 30))]),
            sampling=Sampling(max_tokens=MOST, seed=place, stop_ids=tuple(range(0, 400, 40))),
        )
        for place in range(NUM)
    ]


class Heard:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ids: dict[str, list[int]] = {}
        self.num_ended = 0

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def hear(self, items: tuple[tuple[str, Output], ...]) -> None:
        for name, output in items:
            self.ids.setdefault(name, []).extend(output.ids)
            self.num_ended += output.finish is not None


async def serve(folder: Path, admit: str) -> Heard:
    executor, heard = open_executor(str(folder), ENGINE), Heard()
    policies = ReplicaPolicies(
        order=find("order", "fcfs")(),
        admit=find("admit", admit)(),
        batch=find("batch", "vllm-v1")(),
        evict=find("evict", "recompute-last")(),
        blocks=find("evict", "lru")(),
    )
    cost = StepPredictor(Fitted({"token": 1e-3}, name="", digest="", num_layers=1), 1)
    lengths = RecentLengths(History(enough=8))
    replica = Replica(
        ReplicaConfig(num_blocks=executor.num_blocks),
        executor,
        policies,
        Predictors(cost=cost, lengths=lengths),
        log=heard,
        on_outputs=heard.hear,
    )
    running = asyncio.get_running_loop().create_task(replica.run())
    for request in requests():
        replica.submit(request)
    while heard.num_ended < NUM and not running.done():
        await asyncio.sleep(0.002)
    await replica.stop()
    await running
    return heard


@pytest.mark.slow
async def test_fewer_preemptions_and_the_same_text(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "qwen3")
    told = {name: await serve(folder, name) for name in ("full-fit", "past-future")}
    preempted = {
        name: sum(each.num_preemptions for each in heard.events if isinstance(each, Finished))
        for name, heard in told.items()
    }
    steps = {
        name: sum(isinstance(each, Completed) for each in heard.events)
        for name, heard in told.items()
    }
    lengths = [len(ids) for ids in told["full-fit"].ids.values()]
    assert min(lengths) < 10 and max(lengths) > 80  # nobody can know them before
    assert preempted["full-fit"] >= 30
    assert preempted["past-future"] <= preempted["full-fit"] / 4
    assert steps["past-future"] < 1.5 * steps["full-fit"]
    assert told["past-future"].ids == told["full-fit"].ids
