"""Two lanes of a modelled device: what is left of a step is stretched whenever the other lane begins or ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from penstock.core.plans import Done, Opening, Plan, Work
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Caps, PlanId, Request, RequestId
from penstock.cost.sharing import SHARINGS, Sharing
from penstock.cost.step import StepCost, StepFeatures
from penstock.sim.lanes import LanedExecutor
from penstock.sim.loop import run

CAPS = Caps(
    num_layers=4, max_context=1 << 20, max_repeat=100, max_lanes=2, max_total_share=2.0,
    yield_grain="layer",
)  # fmt: skip


class Work1:
    """A second a token with all cores; nothing is moved."""

    name, digest = "plain", "0"

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        return features.num_tokens / share

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        return [self.seconds(features, share)] * count

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost:
        return StepCost(self.seconds(features, share), None, 0.0, None)


class Bench:
    def __init__(self, sharing: Sharing = SHARINGS["fair"]) -> None:
        self.executor = LanedExecutor(Work1(), caps=CAPS, sharing=sharing, bytes_per_s=1.0)
        self.ends: dict[int, tuple[float, ...]] = {}
        self.yielded: dict[int, float] = {}
        self.executor.listen(self._hear)

    def _hear(self, completion: Any) -> None:
        if isinstance(completion, Done):
            self.ends[completion.plan] = completion.ends
            assert completion.ends[-1] == pytest.approx(asyncio.get_running_loop().time())
        else:
            self.yielded[completion.plan] = completion.at

    def launch(self, lane: int, tokens: int, share: float = 1.0, repeat: int = 1) -> None:
        """Plan and job are called like the lane."""
        request = Request(id=RequestId(f"r{lane}"), model="m", prompt=TracedPrompt(tokens))
        work = Work(lane, 0, tokens, True)
        opened = (Opening(lane, request, 0),)
        self.executor.launch(
            Plan(PlanId(lane), (work,), opened=opened, lane=lane, share=share), repeat
        )


def play(body: Callable[[Bench], Coroutine[Any, Any, None]], *args: Any) -> Bench:
    bench = Bench(*args)
    run(body(bench))
    return bench


def test_two_that_want_all_cores_share_as_in_a_processor_sharing_queue() -> None:
    """10 s of work at 0 s and 3 s at 4 s: the short one takes twice as long, the other waits for no more."""

    async def body(bench: Bench) -> None:
        bench.launch(0, 10)
        await asyncio.sleep(4)
        bench.launch(1, 3)
        await asyncio.sleep(20)

    assert play(body).ends == {1: (pytest.approx(10.0),), 0: (pytest.approx(13.0),)}


def test_parts_of_the_cores_do_not_meet() -> None:
    async def body(bench: Bench) -> None:
        bench.launch(0, 6, 0.6)
        bench.launch(1, 2, 0.4)
        await asyncio.sleep(20)

    assert play(body).ends == {1: (pytest.approx(5.0),), 0: (pytest.approx(10.0),)}


def test_without_contention_each_runs_as_alone() -> None:
    async def body(bench: Bench) -> None:
        bench.launch(0, 10)
        bench.launch(1, 3)
        await asyncio.sleep(20)

    assert play(body, SHARINGS["none"]).ends == {1: (3.0,), 0: (10.0,)}


def test_a_run_of_steps_is_stretched_where_the_other_lane_is_busy() -> None:
    """1 s a step; from 1.5 s to 3.5 s the other lane takes half of everything, over its 1 s of work."""

    async def body(bench: Bench) -> None:
        bench.launch(0, 1, repeat=5)
        await asyncio.sleep(1.5)
        bench.launch(1, 1)
        await asyncio.sleep(20)

    bench = play(body)
    assert bench.ends[1] == (pytest.approx(3.5),)
    assert bench.ends[0] == pytest.approx((1.0, 2.5, 4.0, 5.0, 6.0))


def test_legs_found_later_are_stretched_too() -> None:
    """Beyond its first leg a run is priced anew, at the speed it then has."""

    async def body(bench: Bench) -> None:
        bench.launch(1, 1000)
        bench.launch(0, 1, repeat=60)
        await asyncio.sleep(500)

    bench = play(body)
    assert bench.ends[0] == pytest.approx([2.0 * step for step in range(1, 61)])


def test_an_interrupted_run_ends_with_the_stretched_step() -> None:
    async def body(bench: Bench) -> None:
        bench.launch(0, 1, repeat=50)
        await asyncio.sleep(1.5)
        bench.executor.interrupt(PlanId(0))
        bench.launch(1, 4)
        await asyncio.sleep(20)

    assert play(body).ends[0] == pytest.approx((1.0, 2.5))


def test_whoever_is_gone_leaves_its_cores() -> None:
    async def body(bench: Bench) -> None:
        bench.launch(0, 10)
        bench.launch(1, 10)
        await asyncio.sleep(4)
        bench.executor.abort(PlanId(1))
        await asyncio.sleep(20)

    assert play(body).ends == {0: (pytest.approx(12.0),)}


def test_a_suspended_step_takes_nothing_until_it_goes_on() -> None:
    """Of 8 s half is done at 4 s, when a layer ends; the other lane has the device to itself for 4 s."""

    async def body(bench: Bench) -> None:
        bench.launch(0, 8)
        await asyncio.sleep(3.5)
        bench.executor.interrupt(PlanId(0), "layer")
        await asyncio.sleep(0.5)
        bench.launch(1, 6)
        await asyncio.sleep(4)
        bench.executor.resume(PlanId(0))
        await asyncio.sleep(20)

    bench = play(body)
    assert bench.yielded == {0: pytest.approx(4.0)}
    assert bench.ends[1] == (pytest.approx(12.0),)  # 4 s alone, then 2 s of work at half speed
    assert bench.ends[0] == (pytest.approx(14.0),)
