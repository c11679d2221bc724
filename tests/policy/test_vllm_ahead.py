"""vLLM's asynchronous scheduling: a step is planned while one runs, so admissions lag by one. By hand, steps of 1 s."""

from __future__ import annotations

import asyncio

import pytest

from penstock.core.events import Event, Finished, Stepped
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Caps, Request, RequestId, Sampling
from penstock.cost.fitted import Fitted
from penstock.cost.lengths import RecentLengths
from penstock.cost.predict import StepPredictor
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy import find
from penstock.policy.batch.vllm_v1 import VllmV1
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run
from tests.engine.test_replica import Book

SECOND = Fitted({"step": 1.0}, name="a second", digest="", num_layers=1)


def play(
    batch: VllmV1, arrivals: list[tuple[float, int, int]], *, blocks: int = 1000, repeat: int = 1
) -> list[Event]:
    """`arrivals`: (at, prompt, output) of each request."""
    caps = Caps(num_layers=1, max_context=8192, max_repeat=repeat)
    book = Book()
    policies = ReplicaPolicies(
        order=find("order", "fcfs")(),
        admit=find("admit", "full-fit")(),
        batch=batch,
        evict=find("evict", "recompute-last")(),
        blocks=find("evict", "lru")(),
    )
    predictors = Predictors(cost=StepPredictor(SECOND, 1), lengths=RecentLengths())

    async def main() -> None:
        executor = ModelledExecutor(SECOND, caps=caps)
        config = ReplicaConfig(num_blocks=blocks, is_checked=True)
        replica = Replica(config, executor, policies, predictors, log=book)
        began_at = asyncio.get_running_loop().time()
        for number, (at, prompt, output) in enumerate(arrivals):
            await asyncio.sleep(began_at + at - asyncio.get_running_loop().time())
            request = Request(
                id=RequestId(f"r{number}"),
                model="m",
                prompt=TracedPrompt(prompt),
                sampling=Sampling(max_tokens=output),
                true_output=output,
            )
            replica.submit(request, every_token=False)
        await replica.drain()
        await replica.stop()

    run(main())
    return book.events


def first_tokens(events: list[Event]) -> dict[str, float | None]:
    return {one.request: one.first_token_at for one in events if isinstance(one, Finished)}


def test_an_arrival_waits_for_one_step_more() -> None:
    """Arriving during the first step: planned when it ends, for the step after the next."""
    arrivals = [(0.0, 10, 9), (0.5, 10, 9), (3.5, 10, 9)]
    at_once = first_tokens(play(VllmV1(), arrivals))
    ahead = first_tokens(play(VllmV1(is_ahead=True), arrivals))
    assert at_once == {"r0": 1.0, "r1": 2.0, "r2": 5.0}
    assert ahead == {"r0": 1.0, "r1": 3.0, "r2": 6.0}


def test_an_idle_engine_starts_at_once() -> None:
    ahead = first_tokens(play(VllmV1(is_ahead=True), [(0.0, 10, 2), (7.25, 10, 2)]))
    assert ahead == {"r0": 1.0, "r1": 8.25}


def test_a_slot_that_came_free_serves_one_step_later() -> None:
    """r0 ends with step 3, so r2 runs from 3 in the plain scheduler and from 4 in the other."""
    arrivals = [(0.0, 10, 3), (0.0, 10, 9), (0.0, 10, 2)]
    at_once = first_tokens(play(VllmV1(max_jobs=2), arrivals))
    ahead = first_tokens(play(VllmV1(max_jobs=2, is_ahead=True), arrivals))
    assert (at_once["r2"], ahead["r2"]) == (4.0, 5.0)


@pytest.mark.parametrize("blocks", [1000, 30])
@pytest.mark.parametrize("seed", [1, 2])
def test_running_steps_as_one_changes_nothing(blocks: int, seed: int) -> None:
    """With room, and with so little memory that jobs are preempted."""
    chance, at, arrivals = stream(seed, "ahead"), 0.0, []
    for _ in range(40):
        at += chance.expovariate(0.1)
        arrivals.append((at, chance.randrange(1, 90), chance.randrange(1, 60)))
    single = play(VllmV1(is_ahead=True, max_jobs=6), arrivals, blocks=blocks)
    merged = play(VllmV1(is_ahead=True, max_jobs=6), arrivals, blocks=blocks, repeat=1 << 20)
    ended = [[one for one in events if isinstance(one, Finished)] for events in (single, merged)]
    assert ended[0] == ended[1]
    steps = [sum(isinstance(one, Stepped) for one in events) for events in (single, merged)]
    assert steps[1] < steps[0]
