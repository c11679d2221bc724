"""Executors of diffusion language models, real or modelled, answer the same plans alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from penstock.core.plans import Done, Opening, Plan, Work
from penstock.core.ports import Completion, Executor
from penstock.core.prompt import TokenPrompt
from penstock.core.types import CanvasRule, Caps, Phase, PlanId, Request, RequestId, Sampling
from penstock.cost.diffusion import LLADA_8B, CanvasCost
from penstock.cost.hardware import card_of
from penstock.sim.canvases import ModelledCanvases
from penstock.sim.loop import run as run_virtual

PROMPT, MASKS, SIZE, VOCAB = 20, 22, 8, 512  # blocks of 8, 8 and 6
BLOCK_SIZE, NUM_BLOCKS = 16, 64
RULE = CanvasRule(block_tokens=SIZE, steps=4, refresh_every=2, retention=0.5)
PHASES: tuple[Phase, ...] = ("full", "refresh", "reuse", "refresh")
Folder = Callable[[], Path]


@asynccontextmanager
async def open_modelled(folder: Folder, rule: CanvasRule) -> AsyncIterator[Executor]:
    caps = Caps(num_layers=32, max_context=256, canvas=rule)
    executor = ModelledCanvases(CanvasCost(LLADA_8B, card_of("l40s")), caps=caps)
    yield executor
    await executor.stop()


@asynccontextmanager
async def open_torch(folder: Folder, rule: CanvasRule) -> AsyncIterator[Executor]:
    pytest.importorskip("torch")
    from penstock.engine.torch.build import EngineConfig
    from penstock.engine.torch.open import open_leaf

    config = EngineConfig(device="cpu", threads=1, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    executor = open_leaf(str(folder()), config, rule)
    yield executor
    await executor.stop()


LEAVES: dict[str, tuple[Callable, Callable]] = {
    "modelled": (open_modelled, run_virtual),
    "torch": (open_torch, asyncio.run),
}


def request(seq: int, length: int | None = None) -> Request:
    """`length`: how much of the canvas is written; the real leaf is asked for all of it or ends at the first token."""
    stops = tuple(range(VOCAB)) if length == 1 else ()
    return Request(
        id=RequestId(f"r{seq}"),
        model="m",
        prompt=TokenPrompt([3 + (7 * seq + at) % 400 for at in range(PROMPT)]),
        sampling=Sampling(max_tokens=MASKS, temperature=0.0, ignore_eos=True, stop_ids=stops),
        true_output=length,
    )


class Bench:
    """Plans by hand: each job has its own stretch of blocks and goes through its phases."""

    def __init__(self, executor: Executor, rule: CanvasRule) -> None:
        self.executor, self.rule = executor, rule
        self.heard: list[Completion] = []
        self.num_plans = 0
        self.steps: dict[int, int] = {}  # of the active block
        self.told: dict[int, int] = {}
        self._came = asyncio.Event()
        executor.listen(self._hear)

    def _hear(self, completion: Completion) -> None:
        self.heard.append(completion)
        self._came.set()

    def work(self, seq: int, *, is_fresh: bool = False) -> Work:
        """The job's next step; `is_fresh`: the block is begun anew, in memory given anew."""
        is_fresh = is_fresh or seq not in self.steps
        if is_fresh:
            self.steps[seq] = 0
        phase = self.rule.phase(self.steps[seq])
        start = PROMPT + self.told.setdefault(seq, 0)
        tokens = min(SIZE, PROMPT + MASKS - start) if phase == "reuse" else PROMPT + MASKS
        blocks = tuple(range(4 * seq, 4 * seq + 3)) if is_fresh else ()
        at = start if phase == "reuse" else 0
        return Work(seq, at, tokens, True, blocks, is_fresh, None, phase)

    def plan(
        self, *seqs: int, opened: tuple[Request, ...] = (), closed: tuple[int, ...] = ()
    ) -> Plan:
        self.num_plans += 1
        met = tuple(Opening(int(one.id[1:]), one, 0) for one in opened)
        work = tuple([self.work(seq) for seq in seqs])
        return Plan(id=PlanId(self.num_plans), work=work, opened=met, closed=closed)

    async def completion(self, number: int) -> Done:
        async with asyncio.timeout(60):
            while len(self.heard) < number:
                self._came.clear()
                await self._came.wait()
        done = self.heard[number - 1]
        assert isinstance(done, Done)
        return done

    async def launched(self, plan: Plan) -> Done:
        self.executor.launch(plan)
        done = await self.completion(len(self.heard) + 1)
        assert done.plan == plan.id and done.error is None and len(done.ends) == 1
        told = {one.seq: one.tokens for one in done.outputs}
        for one in plan.work:
            tokens = told.get(one.seq, 0)
            self.steps[one.seq] = 0 if tokens else self.steps[one.seq] + 1
            self.told[one.seq] += tokens
        return done

    async def run(self, *seqs: int, opened: tuple[Request, ...] = ()) -> dict[int, int]:
        """Tokens that the step told, by job."""
        done = await self.launched(self.plan(*seqs, opened=opened))
        return {one.seq: one.tokens for one in done.outputs}


Checked = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    def made() -> Path:
        pytest.importorskip("transformers")
        from tests.engine.torch.canvases import saved_canvas

        root = tmp_path_factory.getbasetemp() / "twins of canvases"
        root.mkdir(exist_ok=True)
        return saved_canvas(root, "llada")[0]

    return made


@pytest.fixture(params=sorted(LEAVES))
def check(request: pytest.FixtureRequest, folder: Folder) -> Checked:
    opened, run = LEAVES[request.param]

    def checked(body: Callable[[Bench], Awaitable[None]], rule: CanvasRule = RULE) -> None:
        async def scenario() -> None:
            async with opened(folder, rule) as executor:
                assert executor.caps.canvas == rule
                await body(Bench(executor, rule))

        run(scenario())

    return checked


def test_a_launch_answers_with_its_plan_and_never_before_it_returns(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        began = asyncio.get_running_loop().time()
        plan = bench.plan(0, opened=(request(0),))
        assert bench.executor.launch(plan) == plan.id
        assert bench.heard == []
        done = await bench.completion(1)
        assert (done.plan, done.outputs, done.error) == (plan.id, (), None)
        assert began < done.ends[0] <= asyncio.get_running_loop().time()

    check(body)


@pytest.mark.parametrize("rule", [RULE, CanvasRule(block_tokens=SIZE, steps=8, retention=1.0)])
def test_a_block_is_told_whole_by_its_last_step_and_the_next_begins(
    check: Checked, rule: CanvasRule
) -> None:
    """Also the last one, which is shorter and has no more steps than masks."""

    async def body(bench: Bench) -> None:
        found = [await bench.run(0, opened=(request(0),))]
        while bench.told[0] < MASKS:
            found.append(await bench.run(0))
        told = [dict[int, int]()] * (rule.steps - 1)
        last = [dict[int, int]()] * (min(rule.steps, 6) - 1)
        assert found == [*told, {0: SIZE}, *told, {0: SIZE}, *last, {0: 6}]
        assert not any(one.is_stop for done in bench.heard for one in done.outputs)  # type: ignore[union-attr]

    check(body, rule)


def test_jobs_in_different_phases_share_a_step(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        assert [bench.rule.phase(step) for step in range(4)] == list(PHASES)
        await bench.run(0, opened=(request(0),))
        await bench.run(0, 1, opened=(request(1),))
        await bench.run(0, 1)
        assert await bench.run(0, 1, 2, opened=(request(2),)) == {0: SIZE}
        assert await bench.run(0, 1, 2) == {1: SIZE}
        assert [bench.steps[seq] for seq in range(3)] == [1, 0, 2]

    check(body)


def test_an_answer_that_ends_says_so_with_the_block_in_which_it_does(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        plan = bench.plan(0, 1, opened=(request(0, 1), request(1)))
        await bench.launched(plan)
        for _ in range(2):
            await bench.run(0, 1)
        done = await bench.launched(bench.plan(0, 1))
        told = [(one.seq, one.tokens, one.is_stop) for one in done.outputs]
        assert told == [(0, 1, True), (1, SIZE, False)]

    check(body)


def test_a_job_whose_memory_was_taken_begins_its_block_anew(check: Checked) -> None:
    """What it told stays told."""

    async def body(bench: Bench) -> None:
        await bench.run(0, opened=(request(0),))
        for _ in range(5):
            await bench.run(0)
        assert (bench.told[0], bench.steps[0]) == (SIZE, 2)
        del bench.steps[0]
        found = [await bench.run(0) for _ in range(4)]
        assert found == [{}, {}, {}, {0: SIZE}]

    check(body)


def test_an_aborted_plan_is_heard_of_no_more(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        await bench.run(0, opened=(request(0),))
        plan = bench.plan(0)
        bench.executor.launch(plan)
        bench.executor.abort(plan.id)
        bench.executor.abort(plan.id)
        await bench.run(1, opened=(request(1),))
        await asyncio.sleep(0.05)
        assert [one.plan for one in bench.heard] == [1, 3]  # type: ignore[union-attr]

    check(body)


def test_an_interrupt_asks_for_nothing_here(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        plan = bench.plan(0, opened=(request(0),))
        bench.executor.launch(plan)
        for grain in ("operator", "layer", "step"):
            bench.executor.interrupt(plan.id, grain)  # type: ignore[arg-type]
        assert (await bench.completion(1)).plan == plan.id
        await asyncio.sleep(0.05)
        assert len(bench.heard) == 1

    check(body)


def test_closed_jobs_leave_their_place_and_strangers_are_ignored(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        for _ in range(3):
            await bench.run(0, opened=(request(0),))
            await bench.run(0)
            bench.executor.close_jobs([0, 10_000])
            del bench.steps[0]
        await bench.launched(bench.plan(0, opened=(request(0),), closed=(4,)))
        assert len(bench.heard) == 7

    check(body)


def test_after_stop_nothing_is_heard(check: Checked) -> None:
    async def body(bench: Bench) -> None:
        bench.executor.launch(bench.plan(0, opened=(request(0),)))
        await bench.executor.stop()
        await bench.executor.stop()
        heard = len(bench.heard)
        await asyncio.sleep(0.05)
        assert len(bench.heard) == heard
        with pytest.raises(AssertionError):
            bench.executor.launch(bench.plan(1, opened=(request(1),)))

    check(body)
