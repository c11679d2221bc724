"""Steps left in the middle: what comes out is the same to the bit, what they hold is what they say, aborts free it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.core.plans import Done, Yielded
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.open import EngineConfig, open_executor
from tests.engine.torch.driver import GREEDY, Driver
from tests.engine.torch.models import saved
from tests.engine.torch.test_layered import recorded

ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=64)
LONG = [3 + (11 * at) % 500 for at in range(250)]
SHORT = [9, 8, 7, 6, 5]
DENSE = pytest.mark.parametrize("executor", ["llama-8"], indirect=True)


@pytest.fixture
async def executor(
    model_root: Path, request: pytest.FixtureRequest
) -> AsyncIterator[TorchExecutor]:
    opened = open_executor(str(saved(model_root, request.param)[0]), ENGINE)
    yield opened
    await opened.stop()


async def leave(driver: Driver, plan: int, grain: str = "operator") -> Yielded | Done:
    driver.executor.interrupt(plan, grain)  # type: ignore[arg-type]
    told = await asyncio.wait_for(driver.told.get(), 20)
    assert told.plan == plan
    return told


def live_bytes() -> int:
    """Of all tensors there are, storages counted once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor]
    storages = [one.untyped_storage() for one in tensors if not one.is_mkldnn]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


@pytest.mark.parametrize(
    ("executor", "grain"),
    [("llama-8", "operator"), ("llama-8", "layer"), ("qwen3-moe-8", "operator")],
    indirect=["executor"],
)
async def test_logits_are_the_same_to_the_bit(executor: TorchExecutor, grain: str) -> None:
    """A prompt with decodes beside it is left at every boundary; whole steps of others run meanwhile."""
    found = recorded(executor)
    texts, logits = [], []
    for is_left in (False, True):
        driver = Driver(executor)
        beside, job, other = (driver.job(ids, GREEDY) for ids in (SHORT, LONG, SHORT[:2]))
        await driver.finish([beside], 1)
        parts = [(beside, 1), (job, len(LONG))]
        plan = driver.plan(parts)
        executor.launch(plan)
        stops = 0
        while is_left and isinstance(told := await leave(driver, plan.id, grain), Yielded):
            stops += 1
            await driver.step([(other, other.known - other.computed)])
            found.pop()
            executor.resume(plan.id)
        if not is_left:
            told = await asyncio.wait_for(driver.told.get(), 20)
        assert not is_left or stops == 8 * (2 if grain == "operator" else 1)
        assert isinstance(told, Done)
        driver.apply(parts, told)
        await driver.finish([beside, job], 5)
        texts.append((beside.outputs, job.outputs))
        logits.append(list(found))
        found.clear()
        for one in (beside, job, other):
            driver.close(one)
    assert texts[0] == texts[1]
    assert all(torch.equal(*pair) for pair in zip(*logits, strict=True))


@DENSE
async def test_what_is_held_is_what_is_said_and_aborts_free_it(executor: TorchExecutor) -> None:
    driver = Driver(executor)
    first, second = driver.job(LONG, GREEDY), driver.job(LONG, GREEDY)
    await driver.finish([driver.job(LONG, GREEDY)], 2)  # tables have grown
    parts = {job.seq: [(job, len(LONG))] for job in (first, second)}
    before = live_bytes()
    plans, said = {}, 0
    for seq, part in parts.items():
        plan = plans[seq] = driver.plan(part)
        executor.launch(plan)
        for _ in range(5):  # into the third layer
            told = await leave(driver, plan.id)
            assert isinstance(told, Yielded)
            executor.resume(plan.id)
        told = await leave(driver, plan.id, "layer")
        assert isinstance(told, Yielded)
        said += told.activation_bytes
    held = live_bytes() - before
    arrays = 2 * len(LONG) * 5 * 8  # ids, positions, slots and the like, of each
    assert said / 2 <= held <= said + arrays  # the last one's rows lie in buffers that stay
    assert said == 2 * 2 * len(LONG) * 64 * 4
    executor.abort(plans[first.seq].id)
    executor.resume(plans[second.seq].id)
    done = await asyncio.wait_for(driver.told.get(), 20)
    assert isinstance(done, Done) and done.plan == plans[second.seq].id
    assert live_bytes() == before
    assert executor._lanes[0]._left == {} and executor._lanes[0]._marks == {}


@DENSE
async def test_a_closed_job_of_a_left_plan_harms_nobody(executor: TorchExecutor) -> None:
    driver = Driver(executor)
    alone = driver.job(SHORT, GREEDY)
    await driver.finish([alone], 5)
    closed, stays, late = (driver.job(ids, GREEDY) for ids in (LONG, SHORT, SHORT))
    plan = driver.plan([(closed, len(LONG)), (stays, len(SHORT))])
    executor.launch(plan)
    assert isinstance(await leave(driver, plan.id), Yielded)
    executor.close_jobs([closed.seq])
    await driver.finish([late], 2)  # takes the closed one's row in the table
    executor.resume(plan.id)
    done = await asyncio.wait_for(driver.told.get(), 20)
    assert isinstance(done, Done) and done.error is None
    assert [out.seq for out in done.outputs] == [stays.seq]
    driver.apply([(stays, len(SHORT))], done)
    await driver.finish([stays, late], 5)
    assert stays.outputs == late.outputs == alone.outputs
