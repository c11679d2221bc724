"""Running identical decode steps as one launch changes nothing anybody can see: same instants, counts and memory."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import structs

from penstock.core.events import Event, Finished, Reported, Stepped
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Caps, Request, RequestId, Sampling, Slo
from penstock.cost.hardware import card_of
from penstock.cost.lengths import RecentLengths
from penstock.cost.predict import StepPredictor
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import shape_of
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy import find
from penstock.report.metrics import Metrics
from penstock.report.summary import Figures, GroupFigures
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run
from tests.engine.test_replica import Book

Named = str | tuple[str, dict[str, float]]
PRESETS: dict[str, tuple[Named, Named, Named, Named]] = {
    "vllm": ("fcfs", "full-fit", "vllm-v1", "recompute-last"),
    "watermark": ("edf", "watermark", "vllm-v1", "recompute-priority"),
    "sglang": ("fcfs", "full-fit", "sglang", "retract"),
    "past-future": ("fcfs", "past-future", "vllm-v1", "recompute-last"),
    "conservative": ("fcfs", "conservative", "vllm-v1", "recompute-last"),
    "past-future-10": (
        "fcfs",
        ("past-future", {"every_steps": 10}),
        "prefill-first",
        "recompute-last",
    ),
    "conservative-split": ("fcfs", "conservative", "split-fuse", "recompute-last"),
    "jit-bandwidth": (
        "edf",
        ("jit-bandwidth", {"slots": 3}),
        "constant-dense",
        "recompute-last",
    ),
}
FEW = {
    "vllm",
    "watermark",
    "conservative",
    "past-future-10",
    "conservative-split",
    "jit-bandwidth",
}  # launches


def made(kind: str, named: Named) -> Any:
    name, parameters = (named, {}) if isinstance(named, str) else named
    return find(kind, name)(**parameters)


class Asked:
    """A batch policy that counts how often it is asked."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.num = inner, 0

    def decide(self, view: Any) -> Any:
        self.num += 1
        return self._inner.decide(view)


def simulate(
    preset: str,
    num_blocks: int,
    max_repeat: int,
    seed: int,
    *,
    is_checked: bool = False,
    asked: list[Asked] | None = None,
    reports_every_s: float | None = None,
) -> list[Event]:
    order, admit, batch, evict = PRESETS[preset]
    shape, card = shape_of("llama-3.1-8b"), card_of("a100-80g")
    cost = Roofline(shape, card)
    executor = ModelledExecutor(
        cost, caps=Caps(num_layers=shape.layers, max_context=8192, max_repeat=max_repeat)
    )
    book = Book()
    policies = ReplicaPolicies(
        order=made("order", order),
        admit=made("admit", admit),
        batch=made("batch", batch),
        evict=made("evict", evict),
        blocks=made("evict", "lru"),
    )
    if asked is not None:
        asked.append(Asked(policies.batch))
        policies = dataclasses.replace(policies, batch=asked[0])
    predictors = Predictors(cost=StepPredictor(cost, shape.layers), lengths=RecentLengths())
    config = ReplicaConfig(num_blocks=num_blocks, seed=seed, is_checked=is_checked, tells=("jobs",))
    chance = stream(seed, "traffic")

    async def main() -> None:
        replica = Replica(config, executor, policies, predictors, log=book)
        ended = asyncio.get_running_loop().create_task(replica.run())
        looks = asyncio.get_running_loop().create_task(look(replica))
        for number in range(60):
            await asyncio.sleep(chance.expovariate(3.0))
            prompt = TracedPrompt(chance.randrange(1, 900), (number % 5,), 512)
            request = Request(
                id=RequestId(f"r{number}"),
                model="m",
                prompt=prompt,
                sampling=Sampling(max_tokens=400),
                slo=Slo(deadline_s=10.0),
                true_output=chance.randrange(1, 500),
            )
            replica.submit(request, every_token=False)
            if number % 9 == 8:
                replica.cancel(f"r{number - 2}")
        await replica.drain()
        replica.check()
        looks.cancel()
        await replica.stop()
        await ended

    async def look(replica: Replica) -> None:
        while reports_every_s is not None:
            await asyncio.sleep(reports_every_s)
            report = replica.report()
            book.emit(Reported(at=report.at, who="test", report=report))

    run(main())
    return book.events


def seen(
    events: list[Event], kind: type, drop: Callable[[Event], Event] = lambda e: e
) -> list[Event]:
    return [drop(event) for event in events if isinstance(event, kind)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("num_blocks", [140, 4000])
def test_repeated_steps_equal_single_ones(preset: str, num_blocks: int) -> None:
    single = simulate(preset, num_blocks, 1, seed=3)
    repeated = simulate(preset, num_blocks, 1 << 30, seed=3)
    # Events of one instant may be consumed in another order, so compare them sorted.
    ends = [
        sorted(seen(events, Finished), key=lambda e: (e.request, e.answer))
        for events in (single, repeated)
    ]
    at_zero = [[structs.replace(event, at=0.0) for event in one] for one in ends]
    assert at_zero[0] == at_zero[1]
    assert len(at_zero[0]) == 60
    num_steps = len(seen(single, Stepped)), len(seen(repeated, Stepped))
    assert num_steps[1] <= num_steps[0]
    decided = [
        [(e.at, e.admitted, e.evicted) for e in events if isinstance(e, Stepped) and e.admitted]
        for events in (single, repeated)
    ]
    assert decided[0] == decided[1]
    if preset in FEW:
        assert num_steps[1] < num_steps[0] / 2
    if num_blocks == 140 and preset == "vllm":
        assert sum(event.num_preemptions for event in ends[0]) > 0


@pytest.mark.parametrize("num_blocks", [140, 4000])
def test_reports_do_not_show_whether_steps_repeat(num_blocks: int) -> None:
    """Every 0.37 s; how long the last step took is known when a plan has ended, so that may differ."""
    single, repeated = (
        simulate("vllm", num_blocks, most, seed=3, reports_every_s=0.37) for most in (1, 1 << 30)
    )
    told = [
        [
            structs.replace(event.report, step_s=0.0)
            for event in events
            if isinstance(event, Reported)
        ]
        for events in (single, repeated)
    ]
    assert told[0] == told[1]
    assert len(told[0]) > 60 and len({report.free_blocks for report in told[0]}) > 20


@pytest.mark.parametrize("batch", ["vllm", "past-future-10", "conservative-split"])
@pytest.mark.parametrize("num_blocks", [140, 4000])
def test_decisions_that_need_no_asking_are_those_that_asking_gives(
    batch: str, num_blocks: int
) -> None:
    """A checked replica asks each time, and compares. While nobody waits, only arrivals need a decision."""
    asked: list[Asked] = []
    found = simulate(batch, num_blocks, 1 << 30, seed=4, asked=asked)
    assert simulate(batch, num_blocks, 1 << 30, seed=4, is_checked=True) == found
    num_steps = len(seen(found, Stepped))
    assert asked[0].num < num_steps
    if num_blocks == 4000:
        assert asked[0].num < 0.5 * num_steps


def figures_of(events: list[Event]) -> tuple[Figures, list[float]]:
    """All figures but one, exactly; mean gaps apart, whose sums are taken in another order."""
    figures, means = Metrics().read(events).figures(), list[float]()

    def without_mean(group: GroupFigures) -> GroupFigures:
        means.append(group.itl_s.mean or 0.0)
        return dataclasses.replace(group, itl_s=dataclasses.replace(group.itl_s, mean=None))

    rest = dataclasses.replace(
        figures,
        all=without_mean(figures.all),
        tenants={name: without_mean(group) for name, group in figures.tenants.items()},
        classes={name: without_mean(group) for name, group in figures.classes.items()},
    )
    return rest, means


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("num_blocks", [140, 4000])
def test_figures_are_those_of_single_steps(preset: str, num_blocks: int) -> None:
    single, single_means = figures_of(simulate(preset, num_blocks, 1, seed=5))
    repeated, repeated_means = figures_of(simulate(preset, num_blocks, 1 << 30, seed=5))
    assert single.all.num_finished > 40
    assert single == repeated
    assert single_means == pytest.approx(repeated_means, rel=1e-12)
