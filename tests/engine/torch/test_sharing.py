"""A request whose first blocks lie in another executor's memory says what it says when all of them are here."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from penstock.core.plans import Done
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.open import EngineConfig, open_executor
from tests.engine.torch.driver import Driver, Held
from tests.engine.torch.models import saved

LONG = [3 + (11 * at) % 500 for at in range(150)]
SHORT = [9, 8, 7, 6, 5]
SIZE = 16


def opened(root: Path, name: str, **more: object) -> TorchExecutor:
    told = {"device": "cpu", "dtype": "fp32", "threads": 1, "num_blocks": 32, **more}
    config = EngineConfig(shares_kv=True, lends=True, **told)  # type: ignore[arg-type]
    return open_executor(str(saved(root, name)[0]), config)


async def spill(home: Driver, job: Held, count: int, first: int) -> None:
    """The job's first `count` blocks that are still here go to the loan that begins with number `first`."""
    done: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
    away = sum(block >= home.executor.num_blocks for block in job.blocks)
    runs = [(block, first + at, 1) for at, block in enumerate(job.blocks[away : away + count])]
    assert home.executor.sharing is not None
    home.executor.sharing.spill(runs, done.set_result)
    assert await asyncio.wait_for(done, 20) is None
    home.free += job.blocks[away : away + count]
    job.blocks[away : away + count] = [number for _, number, _ in runs]
    job.is_fresh = True


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama-8", {}),
        ("llama-8", {"attention": "gather"}),
        ("llama-8", {"kv": "int8"}),
        ("deepseek-v3", {}),
    ],
)
async def test_the_text_is_the_same(model_root: Path, name: str, more: dict[str, object]) -> None:
    """Chunks and single tokens, beside another job, with two creditors one after the other."""
    home, one, two = (opened(model_root, name, **more) for _ in range(3))
    texts = []
    try:
        for is_away in (False, True):
            driver = Driver(home)
            long, short = driver.job(LONG), driver.job(SHORT)
            await driver.step([(long, 64)])
            if is_away:
                assert home.sharing and one.sharing and two.sharing
                numbers = home.num_blocks, home.num_blocks + 3
                for loan, (creditor, first) in enumerate(zip((one, two), numbers, strict=True)):
                    address = creditor.sharing.lend(loan, [20, 7, 8, 3])  # type: ignore[union-attr]
                    home.sharing.borrow(loan, first, 3, address)
                await spill(driver, long, 3, numbers[0])
            await driver.step([(long, 80), (short, 3)])
            if is_away:
                await spill(driver, long, 2, numbers[1])
            await driver.finish([long, short], 6)
            if is_away:
                await spill(driver, long, 1, numbers[1] + 2)
            await driver.finish([long, short], 20)
            texts.append((long.outputs, short.outputs))
            driver.close(long)
            driver.close(short)
            if is_away:
                for loan, creditor in enumerate((one, two)):
                    home.sharing.give_back(loan)  # type: ignore[union-attr]
                    creditor.sharing.take_back(loan)  # type: ignore[union-attr]
    finally:
        for executor in (home, one, two):
            await executor.stop()
    assert texts[0] == texts[1]
    assert len(texts[0][0]) == 20


@pytest.mark.parametrize("more", [{}, {"attention": "gather"}, {"kv": "int8"}])
async def test_what_comes_home_or_goes_to_another_is_what_it_was(
    model_root: Path, more: dict[str, object]
) -> None:
    """From one creditor some blocks go to another and some come home, to the middle of the table."""
    home, one, two = (opened(model_root, "llama-8", **more) for _ in range(3))
    texts = []
    try:
        for is_away in (False, True):
            driver = Driver(home)
            long, short = driver.job(LONG), driver.job(SHORT)
            await driver.step([(long, 150), (short, 5)])
            if is_away:
                assert home.sharing and one.sharing and two.sharing
                first, second = home.num_blocks, home.num_blocks + 10
                home.sharing.borrow(1, first, 6, one.sharing.lend(1, [9, 4, 5, 30, 2, 8, 1]))
                await spill(driver, long, 6, first)
                await driver.finish([long, short], 3)
                home.sharing.borrow(2, second, 2, two.sharing.lend(2, [11, 3, 0]))
                await recall(
                    driver, long, {first + 5: second, first + 3: second + 1, first + 4: None}
                )
                one.sharing.take_back(1, 3)
                await driver.finish([long, short], 6)
            await driver.finish([long, short], 20)
            texts.append((long.outputs, short.outputs))
            driver.close(long)
            driver.close(short)
    finally:
        for executor in (home, one, two):
            await executor.stop()
    assert texts[0] == texts[1] and len(texts[0][0]) == 20


async def recall(home: Driver, job: Held, goes: dict[int, int | None]) -> None:
    """Lent blocks go to other numbers, or home (None)."""
    done: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
    told = {each: home.free.pop() if to is None else to for each, to in goes.items()}
    assert home.executor.sharing is not None
    home.executor.sharing.relocate([(each, to, 1) for each, to in told.items()], done.set_result)
    assert await asyncio.wait_for(done, 20) is None
    job.blocks[:] = [told.get(block, block) for block in job.blocks]
    job.is_fresh = True


async def test_a_creditor_that_is_gone_ends_its_job_alone(model_root: Path) -> None:
    home, one = (opened(model_root, "llama-8") for _ in range(2))
    try:
        assert home.sharing and one.sharing
        driver = Driver(home)
        long, short = driver.job(LONG), driver.job(SHORT)
        await driver.step([(long, 64), (short, 5)])
        home.sharing.borrow(7, home.num_blocks, 3, one.sharing.lend(7, [1, 2, 3, 4]))
        await spill(driver, long, 3, home.num_blocks)
        await driver.step([(long, 80), (short, 1)])
        one.sharing.take_back(7)
        done = await driver.step([(long, 6), (short, 1)])
        assert isinstance(done, Done) and done.error is None
        told = {output.seq: output for output in done.outputs}
        assert "is gone" in (told[long.seq].error or "")
        assert told[short.seq].tokens == 1 and told[short.seq].error is None
    finally:
        await home.stop()
        await one.stop()
