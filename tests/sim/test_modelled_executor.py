"""The modelled executor: durations, lengths, repeats, interruptions. What every executor promises is in tests/twins."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.plans import Done, Opening, Plan, Work, Yielded
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Caps, PlanId, Request, RequestId
from penstock.cost.hardware import card_of
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import shape_of
from penstock.cost.step import StepCost, StepFeatures
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run

CAPS = Caps(
    num_layers=32, max_context=1 << 20, max_repeat=1 << 20, max_lanes=2, has_layer_ranges=True
)


class Plain:
    """1 s a step, and 0.001 s for each position that decodes read. Shares slow it down in proportion."""

    name, digest = "plain", "0"

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        return (1.0 + 0.001 * features.decode_context) / share

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        return [self.seconds(features.grown(step), share) for step in range(count)]

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost:
        raise NotImplementedError


def request(num_prompt: int, true_output: int | None, name: str = "r") -> Request:
    return Request(
        id=RequestId(name), model="m", prompt=TracedPrompt(num_prompt), true_output=true_output
    )


def opening(seq: int, num_prompt: int, true_output: int | None) -> Opening:
    return Opening(seq, request(num_prompt, true_output, f"r{seq}"), 0)


class Bench:
    def __init__(self, model: Any = None, **more: Any) -> None:
        self.executor = ModelledExecutor(model or Plain(), caps=CAPS, **more)
        self.heard: list[Done | Yielded] = []
        self.times: list[float] = []
        self.executor.listen(self._hear)
        self.launched = 0
        self._waiter: asyncio.Future[None] | None = None

    def _hear(self, completion: Done | Yielded) -> None:
        self.heard.append(completion)
        self.times.append(asyncio.get_running_loop().time())
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def launch(self, *work: Work, repeat: int = 1, **more: Any) -> PlanId:
        self.launched += 1
        return self.executor.launch(Plan(PlanId(self.launched), work, **more), repeat)

    async def done(self, count: int = 1) -> Done:
        while len(self.heard) < count:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        found = self.heard[count - 1]
        assert isinstance(found, Done)
        return found


def play(body: Callable[[Bench], Coroutine[Any, Any, None]], bench: Bench | None = None) -> Bench:
    made = bench or Bench()
    run(body(made))
    return made


def test_a_step_lasts_what_the_model_says_and_yields_a_count() -> None:
    async def body(bench: Bench) -> None:
        bench.launch(Work(7, 0, 10, True), opened=(opening(7, 10, 3),))
        done = await bench.done()
        assert done.ends == (1.0,) and bench.times == [1.0]
        assert [(one.seq, one.tokens, one.is_stop, one.ids) for one in done.outputs] == [
            (7, 1, False, ())
        ]

    play(body)


def test_unfinished_prefill_yields_nothing() -> None:
    async def body(bench: Bench) -> None:
        opened = (opening(0, 10, 1), opening(1, 4, 1))
        bench.launch(Work(0, 0, 6, False), Work(1, 0, 4, True), opened=opened)
        done = await bench.done()
        assert [(one.seq, one.is_stop) for one in done.outputs] == [(1, True)]

    play(body)


def test_a_repeat_stops_after_the_first_step_in_which_an_answer_ends() -> None:
    async def body(bench: Bench) -> None:
        # Job 0 has 10 + 2 known positions of 10 + 5: it draws its 3rd, 4th and 5th token. Job 1 has 9 left.
        opened = (opening(0, 10, 5), opening(1, 20, 10))
        bench.launch(Work(0, 11, 1, True), Work(1, 20, 1, True), repeat=50, opened=opened)
        done = await bench.done()
        assert done.steps_run == 3
        assert [(one.seq, one.tokens, one.is_stop) for one in done.outputs] == [
            (0, 3, True),
            (1, 3, False),
        ]

    play(body)


def test_without_a_true_length_an_answer_does_not_end_by_itself() -> None:
    async def body(bench: Bench) -> None:
        bench.launch(Work(0, 10, 1, True), repeat=400, opened=(opening(0, 10, None),))
        done = await bench.done()
        assert done.steps_run == 400 and not done.outputs[0].is_stop

    play(body)


def test_recomputing_after_a_preemption_counts_no_token_again() -> None:
    async def body(bench: Bench) -> None:
        bench.launch(Work(0, 0, 10, True), opened=(opening(0, 10, 3),))
        assert not (await bench.done(1)).outputs[0].is_stop  # 1st
        bench.launch(Work(0, 10, 1, True))
        assert not (await bench.done(2)).outputs[0].is_stop  # 2nd
        bench.launch(Work(0, 0, 8, False, is_fresh=True))  # thrown out; again from position 0
        assert (await bench.done(3)).outputs == ()
        bench.launch(Work(0, 8, 4, True))
        assert (await bench.done(4)).outputs[0].is_stop  # 3rd, drawn at position 12 = known

    play(body)


@settings(max_examples=40, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 40)), min_size=1, max_size=6),
    seed=st.integers(0, 10),
    is_real=st.booleans(),
)
def test_one_launch_of_many_steps_equals_many_launches_of_one(
    jobs: list[tuple[int, int]], seed: int, is_real: bool
) -> None:
    """Same instants, bit for bit, and same outputs; also when interrupted at arbitrary moments."""
    model = Roofline(shape_of("llama-3.1-8b"), card_of("a100-80g")) if is_real else Plain()

    def scheduler(num_running: int, num_waiting: int) -> float:
        return 1e-4 + 3e-6 * num_running

    def once(at_once: int, interrupts: list[float]) -> list[tuple[float, int, bool]]:
        bench = Bench(model, scheduler=scheduler)
        seen: list[tuple[float, int, bool]] = []

        async def body(bench: Bench) -> None:
            opened = tuple(opening(seq, size, out) for seq, (size, out) in enumerate(jobs))
            position = {seq: size for seq, (size, _) in enumerate(jobs)}
            loop = asyncio.get_running_loop()
            for at in interrupts:
                loop.call_at(at, interrupt)
            while position:
                work = [Work(seq, at, 1, True) for seq, at in position.items()]
                bench.launch(
                    *work, repeat=at_once, opened=opened, num_running=len(work), num_waiting=0
                )
                opened = ()
                count = len(bench.heard) + 1
                done = await bench.done(count)
                for step, end in enumerate(done.ends):
                    last = step == done.steps_run - 1
                    seen.extend((end, one.seq, one.is_stop and last) for one in done.outputs)
                for one in done.outputs:
                    position[one.seq] += one.tokens
                    if one.is_stop:
                        del position[one.seq]

        def interrupt() -> None:
            if len(bench.heard) < bench.launched:
                bench.executor.interrupt(PlanId(bench.launched))

        play(body, bench)
        return seen

    draw = random.Random(seed)
    interrupts = sorted(draw.uniform(0, 30 if not is_real else 0.4) for _ in range(8))
    assert once(1, []) == once(1000, []) == once(1000, interrupts) == once(7, interrupts)


def test_an_interrupt_at_a_step_ends_the_run_with_the_step_that_runs() -> None:
    async def body(bench: Bench) -> None:
        plan = bench.launch(Work(0, 0, 1, True), repeat=10, opened=(opening(0, 1, None),))
        await asyncio.sleep(2.5)  # steps last 1.001, 1.002, 1.003
        bench.executor.interrupt(plan)
        bench.executor.interrupt(plan)
        done = await bench.done()
        assert done.steps_run == 3 and bench.times == [done.ends[-1]]
        assert done.ends == pytest.approx((1.001, 2.003, 3.006))
        assert done.outputs[0].tokens == 3

    play(body)


def test_a_layer_boundary_yields_and_a_resumed_plan_finishes_its_rest() -> None:
    async def body(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        plan = bench.launch(Work(0, 0, 64, True), opened=(opening(0, 64, 5),))
        await asyncio.sleep(0.40)
        bench.executor.interrupt(plan, "layer")
        await asyncio.sleep(0.1)
        border = math.ceil(0.40 * 32) / 32
        assert isinstance(bench.heard[0], Yielded) and bench.heard[0].at == pytest.approx(border)
        assert bench.heard[0].activation_bytes == 64 * 100
        other = bench.launch(Work(1, 0, 4, True), opened=(opening(1, 4, 5),))  # the lane is free
        await asyncio.sleep(3)
        assert bench.heard[1].plan == other
        resumed_at = loop.time()
        bench.executor.resume(plan)
        await asyncio.sleep(3)
        assert isinstance(bench.heard[2], Done) and bench.heard[2].plan == plan
        assert bench.times[2] - resumed_at == pytest.approx(1.0 - border)
        assert bench.heard[2].ends == (bench.times[2],)

    play(body, Bench(activation_bytes=100))


def test_an_operator_boundary_is_finer_than_a_layer() -> None:
    async def body(bench: Bench) -> None:
        plan = bench.launch(Work(0, 0, 64, True), opened=(opening(0, 64, 5),))
        await asyncio.sleep(0.40)
        bench.executor.interrupt(plan, "operator")
        await asyncio.sleep(0.5)
        assert isinstance(bench.heard[0], Yielded)
        assert 0.40 <= bench.heard[0].at <= 0.40 + 1 / (32 * 2)

    play(body)


def test_a_repeated_plan_that_yielded_ends_with_the_step_it_was_in() -> None:
    async def body(bench: Bench) -> None:
        plan = bench.launch(Work(0, 0, 1, True), repeat=10, opened=(opening(0, 1, None),))
        await asyncio.sleep(2.5)
        bench.executor.interrupt(plan, "layer")
        await asyncio.sleep(5)
        bench.executor.resume(plan)
        await asyncio.sleep(5)
        assert isinstance(bench.heard[1], Done) and bench.heard[1].steps_run == 3
        assert bench.heard[1].ends[:2] == pytest.approx((1.001, 2.003))

    play(body)


def test_two_lanes_run_side_by_side_at_their_shares() -> None:
    async def body(bench: Bench) -> None:
        opened = (opening(0, 10, 5), opening(1, 10, 5))
        bench.launch(Work(0, 0, 10, True), lane=0, share=0.5, opened=opened[:1])
        bench.launch(Work(1, 0, 10, True), lane=1, share=0.25, opened=opened[1:])
        await asyncio.sleep(10)
        assert bench.times == [2.0, 4.0]

    play(body)


def test_a_layered_plan_costs_its_layers() -> None:
    """Prefill through 8 of 32 layers and decodes through all: between decodes alone and the whole prefill."""
    model = Roofline(shape_of("llama-3.1-8b"), card_of("h100"))

    def lasts(*work: Work) -> float:
        async def body(bench: Bench) -> None:
            opened = (opening(0, 2000, 5), opening(1, 4096, 5))
            bench.launch(*work, opened=opened)
            await bench.done()

        return play(body, Bench(model)).times[0]

    decode, whole = Work(0, 2001, 1, True), Work(1, 0, 4096, True)
    alone, both = lasts(decode), lasts(decode, whole)
    part = lasts(decode, whole._replace(layers=(8, 16), samples=False))
    assert alone < part < both
    assert part - alone == pytest.approx((both - alone) / 4, rel=0.05)


def test_misuse_is_an_error() -> None:
    async def body(bench: Bench) -> None:
        bench.launch(Work(0, 0, 4, True), opened=(opening(0, 4, 5),))
        with pytest.raises(AssertionError, match="idle lane"):
            bench.launch(Work(0, 4, 1, True))
        await bench.done()
        with pytest.raises(AssertionError, match="repeated"):
            bench.launch(Work(0, 4, 2, True), repeat=2)
        await bench.executor.stop()
        with pytest.raises(AssertionError, match="after stop"):
            bench.launch(Work(0, 4, 1, True))

    play(body)


def test_a_meter_hears_of_every_completed_launch_once() -> None:
    heard: list[tuple[StepFeatures, int, float]] = []

    class Meter:
        def add(self, features: StepFeatures, steps: int, seconds: float) -> None:
            heard.append((features, steps, seconds))

    async def main() -> None:
        bench = Bench(meter=Meter())
        bench.launch(Work(0, 0, 40, True), opened=(opening(0, 40, 10),))
        await bench.done(1)
        bench.launch(Work(0, 40, 1, True), repeat=50)
        await bench.done(2)
        plan = bench.launch(Work(0, 49, 1, True), repeat=1)
        bench.executor.abort(plan)
        await bench.executor.stop()

    run(main())
    (first, steps, seconds), (second, more, rest) = heard
    assert (first.num_tokens, first.num_prefills, steps) == (40, 1, 1)
    assert seconds == 1.0
    assert (second.num_decodes, second.decode_context, more) == (1, 41, 9)  # up to the answer's end
    assert rest == pytest.approx(sum(1.0 + 0.001 * (41 + step) for step in range(9)))


def test_bare_counts_read_as_outputs() -> None:
    async def main() -> Done:
        bench = Bench()
        bench.launch(
            Work(0, 0, 40, True),
            Work(1, 0, 8, False),
            opened=(opening(0, 40, 1), opening(1, 20, 5)),
        )
        return await bench.done(1)

    done = run(main())
    assert [(one.seq, one.tokens, one.is_stop, one.error) for one in done.outputs] == [
        (0, 1, True, None)
    ]


def test_a_plan_may_name_a_template_that_prices_it() -> None:
    class Half(Plain):
        def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
            return super().seconds(features, share) / 2

    async def body(bench: Bench) -> None:
        opened = (opening(0, 10, 50),)
        bench.launch(Work(0, 0, 10, True), opened=opened, nano="halves")
        assert (await bench.done(1)).ends == (0.5,)
        bench.launch(Work(0, 10, 1, True), repeat=2, nano="halves")
        assert (await bench.done(2)).ends == pytest.approx((1.0055, 1.5115))
        with pytest.raises(AssertionError, match="no template 'thirds'"):
            bench.launch(Work(0, 12, 1, True), nano="thirds")

    play(body, Bench(templates={"halves": Half()}))
