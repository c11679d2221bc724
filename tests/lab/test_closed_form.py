"""A replica with a modelled executor against results nobody here wrote: queueing theory, and itself step by step."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from penstock.core.clock import sleep_until
from penstock.core.events import Event, Finished
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Caps, Request, RequestId
from penstock.cost.hardware import card_of
from penstock.cost.lengths import RecentLengths
from penstock.cost.predict import StepPredictor
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import shape_of
from penstock.cost.step import StepCost, StepFeatures, StepModel
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy.admit.full_fit import FullFit
from penstock.policy.batch.vllm_v1 import VllmV1
from penstock.policy.evict.lru import Lru
from penstock.policy.evict.recompute_last import RecomputeLast
from penstock.policy.order.fcfs import Fcfs
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run
from penstock.traffic import open_trace

AZURE = Path(__file__).parents[2] / "data" / "azure_2023_conv_200.csv"


class Constant:
    """Every step takes one second."""

    name, digest = "constant", "0"

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        return 1.0

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        return [1.0] * count

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost:
        raise NotImplementedError


class Finishes:
    def __init__(self) -> None:
        self.events: list[Finished] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, Finished):
            self.events.append(event)


def served(
    requests: list[tuple[float, Request]],
    model: StepModel,
    *,
    max_repeat: int = 1 << 20,
    num_blocks: int = 1 << 16,
    **batch: Any,
) -> list[Finished]:
    log, left = Finishes(), len(requests)

    async def main() -> None:
        executor = ModelledExecutor(
            model, caps=Caps(num_layers=32, max_context=1 << 17, max_repeat=max_repeat)
        )
        replica = Replica(
            ReplicaConfig(num_blocks=num_blocks),
            executor,
            ReplicaPolicies(
                order=Fcfs(),
                admit=FullFit(),
                batch=VllmV1(**batch),
                evict=RecomputeLast(),
                blocks=Lru(),
            ),
            Predictors(cost=StepPredictor(model, 32), lengths=RecentLengths()),
            log=log,
        )
        for at, request in requests:
            await sleep_until(at)
            replica.submit(request, every_token=False)
        while len(log.events) < left:
            await asyncio.sleep(100)

    run(main())
    return log.events


@pytest.mark.parametrize("load", [0.4, 0.7])
def test_mean_wait_of_an_m_d_1_queue_is_pollaczek_and_khinchines(load: float) -> None:
    """Poisson arrivals, one job at a time, one step of 1 s each: E[wait] = load / (2 (1 - load))."""
    draw, at, requests = random.Random(11), 0.0, []
    for number in range(6000):
        at += draw.expovariate(load)
        requests.append(
            (
                at,
                Request(
                    id=RequestId(f"{number}"), model="m", prompt=TracedPrompt(10), true_output=1
                ),
            )
        )
    waits = [one.admitted_at - one.arrived_at for one in served(requests, Constant(), max_jobs=1)]
    wanted = load / (2 * (1 - load))
    batches = [statistics.fmean(waits[i : i + 300]) for i in range(0, 6000, 300)]
    error = statistics.stdev(batches) / math.sqrt(len(batches))
    assert abs(statistics.fmean(waits) - wanted) < 3.5 * error
    assert error < 0.15 * wanted  # the test can tell


def test_unloaded_jobs_take_exactly_prefill_and_decode_steps() -> None:
    request = Request(id=RequestId("r"), model="m", prompt=TracedPrompt(5000), true_output=40)
    found = served([(3.0, request)], Constant(), max_tokens=2048)[0]
    # 5,000 tokens at 2,048 a step: 3 steps, the third samples; then 39 decodes.
    assert found.first_token_at == 6.0 and found.last_token_at == 45.0


@pytest.mark.parametrize("num_blocks", [1 << 16, 700])
def test_long_launches_and_single_steps_give_the_same_instants(num_blocks: int) -> None:
    """On a real trace, with and without preemptions: every instant equal, bit for bit."""
    model = Roofline(shape_of("llama-3.1-8b"), card_of("a100-80g"))
    requests = list(open_trace(AZURE, limit=120, speed=4.0))
    single = served(requests, model, max_repeat=1, num_blocks=num_blocks)
    long = served(requests, model, num_blocks=num_blocks)
    assert single == long
    assert len(long) == 120
    assert (sum(one.num_preemptions for one in long) > 0) == (num_blocks == 700)
