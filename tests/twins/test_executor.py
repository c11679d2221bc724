"""Every executor, real or modelled, keeps the same promises. A new leaf is one more entry in LEAVES."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from penstock.core.plans import Decodes, Done, Moved, Opening, Plan, Transfer, Work, Yielded
from penstock.core.ports import Completion, Executor
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Caps, HostLink, PlanId, Request, RequestId, Sampling
from penstock.cost.hardware import card_of
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import shape_of
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run as run_virtual

BLOCK_SIZE, NUM_BLOCKS, VOCAB = 16, 64, 512
HOST_BLOCKS = 32
Folder = Callable[[], Path]


@asynccontextmanager
async def open_modelled(folder: Folder) -> AsyncIterator[Executor]:
    caps = Caps(
        num_layers=32,
        max_context=NUM_BLOCKS * BLOCK_SIZE,
        max_repeat=1 << 20,
        has_layer_ranges=True,
        yield_grain="operator",
        host_blocks=HOST_BLOCKS,
        link=HostLink(dispatch_s=8e-6, bytes_per_s=25e9, block_bytes=1 << 21, pieces=64),
    )
    executor = ModelledExecutor(Roofline(shape_of("llama-3.1-8b"), card_of("h100")), caps=caps)
    yield executor
    await executor.stop()


@asynccontextmanager
async def open_torch(folder: Folder) -> AsyncIterator[Executor]:
    pytest.importorskip("torch")
    from penstock.engine.torch.open import EngineConfig, open_executor

    config = EngineConfig(
        device="cpu",
        threads=1,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        host_blocks=HOST_BLOCKS,
    )
    executor = open_executor(str(folder()), config)
    yield executor
    await executor.stop()


# name -> (how to open one, how to run a coroutine that uses it)
LEAVES: dict[str, tuple[Callable, Callable]] = {
    "modelled": (open_modelled, run_virtual),
    "torch": (open_torch, asyncio.run),
}


class Bench:
    """Plans by hand: jobs get a fixed stretch of blocks each, completions are kept."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.heard: list[Completion] = []
        self._waiter: asyncio.Future[None] | None = None
        self._plans = 0
        self._met: set[int] = set()
        executor.listen(self._hear)

    def _hear(self, completion: Completion) -> None:
        self.heard.append(completion)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def completion(self, number: int) -> Completion:
        async with asyncio.timeout(60):
            while len(self.heard) < number:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
        return self.heard[number - 1]

    def plan(
        self,
        *pieces: tuple[int, int, int],
        ends: bool = False,
        size: int = 40,
        layers: Mapping[int, tuple[int, int]] = {},  # noqa: B006
    ) -> Plan:
        """Pieces are (seq, start, tokens) of jobs with prompts of `size`; `ends`: new jobs end with their 1st token.

        `layers` by seq, of jobs that pass only some.
        """
        self._plans += 1
        work, opened = [], []
        for seq, start, tokens in pieces:
            is_new = seq not in self._met
            if is_new:
                self._met.add(seq)
                opened.append(Opening(seq, request(seq, size, ends), 0))
            blocks = tuple(range(8 * (seq % 8), 8 * (seq % 8) + 8)) if is_new else ()
            through = layers.get(seq)
            is_inner = through is not None and through[1] < self.executor.caps.num_layers
            samples = start + tokens >= size and not is_inner
            work.append(Work(seq, start, tokens, samples, blocks, is_new, through))
        return Plan(id=PlanId(self._plans), work=tuple(work), opened=tuple(opened))

    async def run(self, *pieces: tuple[int, int, int], repeat: int = 1, **more: object) -> Done:
        number = len(self.heard) + 1
        self.executor.launch(self.plan(*pieces, **more), repeat)  # type: ignore[arg-type]
        done = await self.completion(number)
        assert isinstance(done, Done) and done.error is None
        return done


def request(seq: int, size: int, ends: bool) -> Request:
    """The real leaf ends an answer at any of its stop ids, the modelled one at its true length."""
    stops = tuple(range(VOCAB)) if ends else ()
    return Request(
        id=RequestId(f"r{seq}"),
        model="m",
        prompt=TokenPrompt([3 + (seq + i) % 300 for i in range(size)]),
        sampling=Sampling(temperature=0.0, ignore_eos=True, stop_ids=stops),
        true_output=1 if ends else None,
    )


Checked = Callable[[Callable[[Bench], Awaitable[None]]], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    def made() -> Path:
        pytest.importorskip("transformers")
        from tests.engine.torch.models import saved

        return saved(tmp_path_factory.getbasetemp() / "twins", "llama3")[0]

    return made


@pytest.fixture(params=sorted(LEAVES))
def check(request: pytest.FixtureRequest, folder: Folder) -> Checked:
    opened, run = LEAVES[request.param]

    def checked(body: Callable[[Bench], Awaitable[None]]) -> None:
        async def scenario() -> None:
            async with opened(folder) as executor:
                await body(Bench(executor))

        run(scenario())

    return checked


def test_a_launch_answers_with_its_plan_and_never_before_it_returns(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        plan = bench.plan((0, 0, 40))
        assert bench.executor.launch(plan) == plan.id
        assert bench.heard == []
        done = await bench.completion(1)
        assert isinstance(done, Done) and done.plan == plan.id and done.steps_run == 1
        assert len(done.ends) == 1 and began <= done.ends[0] <= loop.time()
        assert [(one.seq, one.tokens, one.is_stop) for one in done.outputs] == [(0, 1, False)]

    check(body)


def test_only_the_chunk_that_reaches_the_end_yields_a_token(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        first = await bench.run((0, 0, 16), (1, 0, 40))
        assert [one.seq for one in first.outputs if one.tokens] == [1]
        second = await bench.run((0, 16, 24), (1, 40, 1))
        assert {one.seq: one.tokens for one in second.outputs} == {0: 1, 1: 1}

    check(body)


def test_completions_come_in_launch_order_with_rising_ends(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        await bench.run((0, 0, 40))
        for position in range(40, 50):
            await bench.run((0, position, 1))
        assert [one.plan for one in bench.heard] == list(range(1, 12))
        ends = [end for one in bench.heard if isinstance(one, Done) for end in one.ends]
        assert ends == sorted(ends)

    check(body)


def test_the_token_that_ends_an_answer_says_so(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        done = await bench.run((0, 0, 40), ends=True)
        assert [(one.seq, one.is_stop) for one in done.outputs] == [(0, True)]
        both = await bench.run((1, 0, 40))
        assert [(one.seq, one.is_stop) for one in both.outputs] == [(1, False)]

    check(body)


def test_a_repeat_runs_at_least_once_and_at_most_as_often_as_asked(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        await bench.run((0, 0, 40), (1, 0, 40))
        repeat = min(6, bench.executor.caps.max_repeat)
        done = await bench.run((0, 40, 1), (1, 40, 1), repeat=repeat)
        assert 1 <= done.steps_run <= repeat and len(done.ends) == done.steps_run
        assert {one.seq: one.tokens for one in done.outputs} == {
            0: done.steps_run,
            1: done.steps_run,
        }
        await bench.run((0, 40 + done.steps_run, 1))

    check(body)


def test_an_interrupt_at_a_step_ends_the_plan_once_with_what_it_ran(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        await bench.run((0, 0, 40))
        repeat = min(50, bench.executor.caps.max_repeat)
        plan = bench.plan((0, 40, 1))
        bench.executor.launch(plan, repeat)
        bench.executor.interrupt(plan.id)
        done = await bench.completion(2)
        assert isinstance(done, Done) and done.plan == plan.id
        assert done.steps_run == 1 == done.outputs[0].tokens
        await asyncio.sleep(0.05)
        assert len(bench.heard) == 2

    check(body)


@pytest.mark.parametrize("grain", ["layer", "operator"])
def test_a_plan_that_yields_can_be_resumed_to_its_end(check: Checked, grain: str) -> None:
    async def body(bench: Bench) -> None:
        plan = bench.plan((0, 0, 40))
        bench.executor.launch(plan)
        bench.executor.interrupt(plan.id, grain)  # type: ignore[arg-type]
        first = await bench.completion(1)
        if isinstance(
            first, Yielded
        ):  # an executor may also have been too far, or know no finer grain
            assert first.plan == plan.id and first.activation_bytes >= 0
            other = await bench.run((1, 0, 40))  # the lane is free meanwhile
            assert other.outputs[0].tokens == 1
            bench.executor.resume(plan.id)
        done = await bench.completion(3 if isinstance(first, Yielded) else 1)
        assert isinstance(done, Done) and done.plan == plan.id
        assert [(one.seq, one.tokens) for one in done.outputs] == [(0, 1)]

    check(body)


def test_an_interrupt_of_a_yielded_plan_says_nothing_more(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        plan = bench.plan((0, 0, 40))
        bench.executor.launch(plan)
        bench.executor.interrupt(plan.id, "operator")
        assert isinstance(await bench.completion(1), Yielded)
        bench.executor.interrupt(plan.id, "step")
        await asyncio.sleep(0.05)
        assert len(bench.heard) == 1
        bench.executor.resume(plan.id)
        assert isinstance(await bench.completion(2), Done)

    check(body)


def test_several_plans_can_be_suspended_and_one_of_them_aborted(check: Checked) -> None:
    """Each goes on from where it stood, in any order; the aborted one is heard of no more."""

    async def body(bench: Bench) -> None:
        plans = [bench.plan((seq, 0, 40)) for seq in range(3)]
        for number, plan in enumerate(plans, 1):
            bench.executor.launch(plan)
            bench.executor.interrupt(plan.id, "layer")
            told = await bench.completion(number)
            assert isinstance(told, Yielded) and told.plan == plan.id
        bench.executor.abort(plans[1].id)
        for number, plan in ((4, plans[2]), (5, plans[0])):
            bench.executor.resume(plan.id)
            done = await bench.completion(number)
            assert isinstance(done, Done) and done.plan == plan.id
        await bench.run((1, 0, 40))
        assert [one.plan for one in bench.heard[3:]] == [3, 1, 4]

    check(body)


def test_a_prompt_can_pass_group_by_group_with_decodes_beside(check: Checked) -> None:
    """Only the group that ends with the last layer yields a token; whoever passes all layers gets one each time."""

    async def body(bench: Bench) -> None:
        num_layers = bench.executor.caps.num_layers
        assert bench.executor.caps.has_layer_ranges
        await bench.run((0, 0, 40))
        borders = (0, 1, 2, num_layers)
        for at, layers in enumerate(pairwise(borders)):
            done = await bench.run((0, 40 + at, 1), (1, 0, 40), layers={1: layers})
            told = {one.seq: one.tokens for one in done.outputs if one.tokens}
            assert told == ({0: 1, 1: 1} if layers[1] == num_layers else {0: 1})
        done = await bench.run((0, 43, 1), (1, 40, 1))
        assert {one.seq: one.tokens for one in done.outputs} == {0: 1, 1: 1}

    check(body)


def test_decodes_by_columns_are_the_same_work(check: Checked) -> None:
    """Alone, and with a prompt behind them."""

    async def body(bench: Bench) -> None:
        await bench.run((0, 0, 40), (1, 0, 40))
        for at in range(2):
            plan = bench.plan(*[(2, 0, 40)] * at)
            others = tuple(plan.work)
            starts = (40 + at, 40 + at)
            plan.work = Decodes((0, 1), starts, {}, others)
            bench.executor.launch(plan)
            done = await bench.completion(len(bench.heard) + 1)
            assert isinstance(done, Done) and done.error is None
            told = [(one.seq, one.tokens) for one in done.outputs]
            assert told == [(0, 1), (1, 1), *[(2, 1)] * at]
        await bench.run((0, 42, 1), (1, 42, 1), (2, 40, 1))

    check(body)


def test_an_aborted_plan_is_heard_of_no_more_and_its_work_can_be_done_again(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        await bench.run((0, 0, 40))
        plan = bench.plan((0, 40, 1))
        bench.executor.launch(plan)
        bench.executor.abort(plan.id)
        bench.executor.abort(plan.id)
        done = await bench.run((0, 40, 1))
        await asyncio.sleep(0.05)
        assert [one.plan for one in bench.heard] == [1, done.plan]
        assert done.outputs[0].tokens == 1

    check(body)


def test_closed_jobs_leave_room_and_strangers_are_ignored(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        for seq in range(0, 80, 8):  # all in the same blocks, one after the other
            await bench.run((seq, 0, 40))
            bench.executor.close_jobs([seq, 10_000])
        assert len(bench.heard) == 10

    check(body)


def test_after_stop_nothing_is_heard_and_nothing_can_be_launched(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        bench.executor.launch(bench.plan((0, 0, 40)))
        await bench.executor.stop()
        await bench.executor.stop()
        heard = len(bench.heard)
        await asyncio.sleep(0.05)
        assert len(bench.heard) == heard
        with pytest.raises(AssertionError):
            bench.executor.launch(bench.plan((1, 0, 40)))

    check(body)


def test_transfers_answer_once_and_never_before_they_return(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        assert bench.executor.caps.host_blocks == HOST_BLOCKS
        await bench.run((0, 0, 40))
        for number in range(4):
            out = Transfer(number, 0, number % 2 == 0, ((0, 0, 2), (2, 5, 1)), number == 3)
            bench.executor.transfer(out)  # type: ignore[attr-defined]
            assert len(bench.heard) == 1 + number
            moved = await bench.completion(2 + number)
            assert isinstance(moved, Moved) and moved.transfer == number
        await asyncio.sleep(0.05)
        assert len(bench.heard) == 5

    check(body)


def test_copies_of_the_same_blocks_follow_each_other_and_plans_follow_them(check: Checked) -> None:
    """Out, in from the same host block, then a plan that waits for all that is sync: told in this order."""

    async def body(bench: Bench) -> None:
        await bench.run((0, 0, 40))
        bench.executor.transfer(Transfer(0, 0, True, ((0, 3, 3),)))  # type: ignore[attr-defined]
        bench.executor.transfer(Transfer(1, 0, False, ((40, 3, 3),), True))  # type: ignore[attr-defined]
        plan = bench.plan((1, 0, 40))
        bench.executor.launch(plan)
        await bench.completion(4)
        told = [one.transfer if isinstance(one, Moved) else one.plan for one in bench.heard[1:]]
        assert told == [0, 1, plan.id]

    check(body)
