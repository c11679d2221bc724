"""Canvases through the real replica in virtual time: phases, budgets, memory, preemption, what callers hear."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.canvas import CanvasJob
from penstock.core.events import Event, Finished, Stepped
from penstock.core.prompt import TracedPrompt
from penstock.core.types import CanvasRule, Caps, Job, Output, Request, RequestId, Sampling
from penstock.core.views import Eviction
from penstock.cost.diffusion import CanvasPiece
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy.admit.full_fit import FullFit
from penstock.policy.batch import Decision, View
from penstock.policy.batch.diffusion import Diffusion
from penstock.policy.evict.lru import Lru
from penstock.policy.evict.recompute_last import RecomputeLast
from penstock.policy.order.fcfs import Fcfs
from penstock.sim.canvases import ModelledCanvases
from penstock.sim.loop import run

RULE = CanvasRule(block_tokens=4, steps=4, retention=0.5)
SIZE = 4


class Second:
    """A second a step; remembers what was asked."""

    def __init__(self) -> None:
        self.steps: list[tuple[CanvasPiece, ...]] = []

    def seconds(self, pieces: Iterable[CanvasPiece]) -> float:
        self.steps.append(tuple(pieces))
        return 1.0


class Nobody:
    def predict(self, chunks: object, share: float = 1.0) -> float:
        return 1.0

    def quantile(self, job: object, q: float) -> int:
        return 1

    def sample(self, job: object, u: float) -> int:
        return 1


class Bench:
    def __init__(
        self, batch: Any, *, num_blocks: int = 64, rule: CanvasRule = RULE, **caps: int
    ) -> None:
        self.price, self.events, self.told = Second(), list[Event](), dict[str, list[Output]]()
        self.peak = 0
        allowed = Caps(num_layers=2, max_context=256, canvas=rule, **caps)  # type: ignore[arg-type]
        self.replica = Replica(
            ReplicaConfig(num_blocks=num_blocks, block_size=SIZE, is_checked=True),
            ModelledCanvases(self.price, caps=allowed),
            ReplicaPolicies(
                order=Fcfs(), admit=FullFit(), batch=batch, evict=RecomputeLast(), blocks=Lru()
            ),
            Predictors(cost=Nobody(), lengths=Nobody()),
            log=self,
            on_outputs=self.hear,
        )

    def emit(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Stepped):
            self.peak = max(self.peak, event.num_running)

    def hear(self, outputs: tuple[tuple[str, Output], ...]) -> None:
        for request, output in outputs:
            self.told.setdefault(request, []).append(output)

    def serve(self, *asked: tuple[int, int, int | None]) -> dict[str, Finished]:
        """(prompt, masks, true length) of requests, all there at once."""

        async def main() -> None:
            running = asyncio.get_running_loop().create_task(self.replica.run())
            for place, (prompt, masks, true_output) in enumerate(asked):
                self.replica.submit(
                    Request(
                        id=RequestId(f"{place}"),
                        model="m",
                        prompt=TracedPrompt(prompt),
                        sampling=Sampling(max_tokens=masks),
                        true_output=true_output,
                    )
                )
            await self.replica.drain()
            await self.replica.stop()
            await running

        run(main())
        assert self.replica.ledger.free == self.replica.ledger.total
        return {one.request: one for one in self.events if isinstance(one, Finished)}


def test_a_canvas_goes_through_its_phases_block_by_block() -> None:
    bench = Bench(Diffusion())
    found = bench.serve((10, 8, None))
    whole, block = CanvasPiece("full", 18, 4, 7), CanvasPiece("reuse", 4, 4, 7)
    each = [whole, whole._replace(phase="refresh"), block, block]
    assert bench.price.steps == [(piece,) for piece in each * 2]
    assert [(one.num_tokens, one.finish) for one in bench.told["0"]] == [(4, None), (4, "length")]
    assert found["0"].first_token_at == 4.0 and found["0"].last_token_at == 8.0


def test_an_answer_that_ends_early_leaves_the_rest_of_its_canvas() -> None:
    bench = Bench(Diffusion())
    found = bench.serve((10, 16, 6))
    assert (found["0"].reason, found["0"].num_output) == ("stop", 6)
    assert len(bench.price.steps) == 8


def test_the_walk_stops_at_the_first_that_does_not_fit() -> None:
    """Canvases of 20 positions under 30 tokens: one whole sequence and two blocks a step at most."""
    bench = Bench(Diffusion(max_tokens=30))
    bench.serve(*[(16, 4, None)] * 3)
    told = [[piece.phase for piece in step] for step in bench.price.steps]
    assert told[:3] == [["full"], ["refresh"], ["reuse", "full"]]
    assert told[3:6] == [["reuse", "refresh"], ["reuse", "full"], ["reuse", "refresh"]]
    assert all(sum(piece.tokens for piece in step) <= 30 for step in bench.price.steps)


def test_rows_bound_a_step_as_well_and_a_long_canvas_is_not_stuck() -> None:
    bench = Bench(Diffusion(max_rows=8))
    bench.serve(*[(4, 4, None)] * 5)
    assert max(len(step) for step in bench.price.steps) == 2
    long = Bench(Diffusion(max_tokens=8, max_rows=1))
    assert long.serve((40, 8, None))["0"].num_output == 8


def test_memory_is_what_is_kept_and_is_taken_at_once() -> None:
    """24 positions, half of them: three blocks of four each, whatever has been told."""
    bench = Bench(Diffusion(), num_blocks=8)
    bench.serve(*[(16, 8, None)] * 5)
    assert bench.peak == 2
    dense = Bench(Diffusion(), num_blocks=8, rule=CanvasRule(block_tokens=4, steps=4, retention=1))
    dense.serve(*[(16, 8, None)] * 5)
    assert dense.peak == 1


def test_in_lockstep_nobody_starts_while_anybody_runs() -> None:
    bench = Bench(Diffusion(is_lockstep=True, max_jobs=2))
    bench.serve((10, 4, None), (10, 8, None), (10, 4, None))
    assert [len(step) for step in bench.price.steps] == [2] * 4 + [1] * 4 + [1] * 4
    assert all(len({piece.phase for piece in step}) == 1 for step in bench.price.steps)


class Fickle(Diffusion):
    """Throws out the last of several running jobs in every 7th step: nobody should have to, and all must go well."""

    __slots__ = ("num",)
    num: int

    def decide(self, view: View) -> Decision:
        self.num = getattr(self, "num", 0) + 1
        if self.num % 7 == 0 and len(view.running) > 1:
            return Decision(evicted=(Eviction(view.running[-1]),))
        return Diffusion.decide(self, view)


def test_a_preempted_canvas_begins_its_block_anew_and_tells_nothing_twice() -> None:
    bench = Bench(Fickle())
    found = bench.serve(*[(9, 12, None)] * 3)
    assert sum(one.num_preemptions for one in found.values()) > 0
    for place in range(3):
        told = [one.num_tokens for one in bench.told[f"{place}"]]
        assert told == [4, 4, 4]


@given(
    asked=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 30), st.none() | st.integers(1, 30)),
        min_size=1,
        max_size=6,
    ),
    steps=st.integers(1, 6),
    delay=st.integers(0, 2),
    refresh_every=st.none() | st.integers(1, 3),
    retention=st.sampled_from([0.2, 0.5, 1.0]),
    max_tokens=st.integers(1, 120),
    is_lockstep=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_everybody_is_answered_whole_within_the_budgets(
    asked: list[tuple[int, int, int | None]],
    steps: int,
    delay: int,
    refresh_every: int | None,
    retention: float,
    max_tokens: int,
    is_lockstep: bool,
) -> None:
    rule = CanvasRule(
        block_tokens=5, steps=steps, delay=delay, refresh_every=refresh_every, retention=retention
    )
    bench = Bench(
        Diffusion(max_tokens=max_tokens, is_lockstep=is_lockstep), num_blocks=40, rule=rule
    )
    found = bench.serve(*asked)
    for place, (_, masks, true_output) in enumerate(asked):
        want = masks if true_output is None else min(masks, true_output)
        assert found[f"{place}"].num_output == want
        assert sum(one.num_tokens for one in bench.told[f"{place}"]) == want
    for step in bench.price.steps:
        tokens = sum(piece.tokens for piece in step)
        assert tokens <= max_tokens or len(step) == 1


def job(**more: Any) -> CanvasJob:
    request = Request(id=RequestId("r"), model="m", prompt=TracedPrompt(10))
    facts: dict[str, Any] = dict(
        seq=0, request=request, answer=0, arrived_at=0.0, hashes=[], num_prompt=10, max_tokens=10
    )
    return CanvasJob(**facts, rule=RULE, **more)


def test_the_frontier_is_one_step_and_says_what_it_needs() -> None:
    one = job()
    [option] = one.frontier()
    assert option == ("full", 20, 20, True, 4, 10) and one.todo == 20
    one.go_on(0)
    one.go_on(0)
    assert one.frontier()[0][:3] == ("reuse", 4, 4) and one.block == (10, 14)
    one.num_output = 8
    one.go_on(4)
    assert one.frontier()[0].phase == "full" and one.block == (18, 20)
    one.in_flight = 20
    assert one.frontier() == [] and one.todo == 0
    assert isinstance(one, Job)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"block_tokens": 0}, "block_tokens must be at least 1"),
        ({"delay": -1}, "delay counts steps"),
        ({"retention": 0.0}, r"retention must lie in \(0, 1\]"),
        ({"threshold": 1.5}, r"threshold must lie in \(0, 1\]"),
    ],
)
def test_rules_that_make_no_sense_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CanvasRule(**wrong)


def test_work_a_token_is_that_of_the_published_program() -> None:
    """(2 L + 30 x 32) / 32 query tokens a token: 94 for L = 1024."""
    rule = CanvasRule()
    phases = [rule.phase(step) for step in range(rule.steps)]
    tokens = sum(32 if phase == "reuse" else 1024 for phase in phases)
    assert tokens / 32 == (2 * 1024 + 30 * 32) / 32 == 94
    assert math.isclose(rule.num_kept(1024), 512)
