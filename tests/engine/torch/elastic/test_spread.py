"""Experts in device processes: the same numbers as in one process, whatever happens to the processes meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.errors import BadConfig, BadRequest, PenstockError
from penstock.core.reshaping import NewShape
from penstock.engine.torch.build import EngineConfig
from penstock.engine.torch.elastic.pages import Arena
from penstock.engine.torch.elastic.spread import Spread, shares
from penstock.engine.torch.elastic.workers import Worker
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.open import open_executor
from penstock.policy.move.elastic_moe import moved
from tests.engine.torch.driver import Driver, Held
from tests.engine.torch.models import saved

ENGINE = EngineConfig(device="cpu", dtype="bf16", threads=1, num_blocks=60)
PROMPTS = [[3 + (11 * at + 7 * job) % 500 for at in range(30 + 9 * job)] for job in range(3)]
FAMILY = "qwen3-moe-8"


def started(driver: Driver) -> list[Held]:
    return [driver.job(ids) for ids in PROMPTS]


async def answers(executor: TorchExecutor, count: int = 24) -> list[list[int]]:
    driver = Driver(executor)
    jobs = started(driver)
    await driver.finish(jobs, count)
    return [job.outputs for job in jobs]


def bytes_of(spread: Spread) -> list[int]:
    """That the arenas take up."""
    return [512 * os.fstat(device.arena.fd).st_blocks for device in spread.devices]


def check_pages(spread: Spread) -> None:
    """A device holds what the table says, and memory for nothing else."""
    size = spread.wanted.page_bytes
    for at, device in enumerate(spread.devices):
        wanted = {(layer, each) for layer, slots in spread.table.items() for each in slots[at]}
        assert set(device.arena.pages) == wanted
        assert len(set(device.arena.pages.values())) == len(wanted)
    most = [len(device.arena.pages) * size for device in spread.devices]
    assert all(held <= bound for held, bound in zip(bytes_of(spread), most, strict=True))


async def unspread(folder: str) -> list[list[int]]:
    executor = open_executor(folder, ENGINE)
    found = await answers(executor)
    await executor.stop()
    return found


async def test_answers_are_the_same_while_a_device_comes_and_goes(tmp_path: Path) -> None:
    folder = str(saved(tmp_path, FAMILY)[0])
    expected = await unspread(folder)
    executor = open_executor(folder, replace(ENGINE, expert_devices=2))
    reshaper = executor.reshaper
    assert reshaper is not None
    spread = reshaper.changes.spread
    check_pages(spread)
    driver = Driver(executor)
    jobs = started(driver)
    await driver.finish(jobs, 4)
    before = dict(spread.table)
    growing = asyncio.ensure_future(reshaper.reshape(3, "elastic-moe"))
    while not growing.done():  # it serves meanwhile
        if len(jobs[0].outputs) == 23:
            await growing
        await driver.finish(jobs, min(23, len(jobs[0].outputs) + 1))
    told = growing.result()
    fewest = sum(moved(before[layer], spread.table[layer]) for layer in before)
    assert told == NewShape(2, 3, fewest, 0, fewest * spread.wanted.page_bytes)
    assert fewest == spread.wanted.num_experts // 3 * len(before)
    check_pages(spread)
    await driver.finish(jobs, 24)
    assert [job.outputs for job in jobs] == expected
    told = await reshaper.reshape(2, "elastic-moe")
    assert len(spread.devices) == 2 and told.num_copied and not told.num_read
    check_pages(spread)
    assert await answers(executor) == expected
    with pytest.raises(BadRequest, match="cannot be spread"):
        await reshaper.reshape(99, "elastic-moe")
    pids = executor.pids
    await executor.stop()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
async def test_a_device_that_dies_takes_nothing_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(saved(tmp_path, FAMILY)[0])
    expected = await unspread(folder)
    executor = open_executor(folder, replace(ENGINE, expert_devices=3))
    reshaper = executor.reshaper
    assert reshaper is not None
    spread = reshaper.changes.spread
    os.kill(spread.devices[1].worker.child.pid, signal.SIGKILL)
    assert await answers(executor) == expected  # a standby took over
    assert spread.num_revived == 1
    told = await reshaper.reshape(3, "eplb")
    assert told.num_copied and not told.num_read
    copies = [sum(len(held) for held in slots) for slots in spread.table.values()]
    assert max(copies) > spread.wanted.num_experts
    check_pages(spread)
    assert await answers(executor) == expected
    await _changes_as_a_whole_or_not_at_all(executor, monkeypatch)
    assert await answers(executor) == expected
    await executor.stop()


async def _changes_as_a_whole_or_not_at_all(
    executor: TorchExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device dies while it gets its experts."""
    assert executor.reshaper is not None
    spread = executor.reshaper.changes.spread
    table, held = dict(spread.table), bytes_of(spread)
    tell = Worker.tell
    told: list[Worker] = []

    def dies(self: Worker, order: object, *handles: int) -> None:
        if type(order).__name__ == "Stock" and not told:
            told.append(self)
            os.kill(self.child.pid, signal.SIGKILL)
            self.child.wait()
        tell(self, order, *handles)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "tell", dies)
        with pytest.raises(PenstockError, match="stay as they were"):
            await executor.reshaper.reshape(2, "elastic-moe")
    assert spread.table == table and bytes_of(spread) == held


def test_rows_of_copies_are_split_in_order() -> None:
    assert shares(((0, 1), (1, 2), (1,)), (2, 5, 0)) == [
        [(0, 0, 2), (1, 2, 2)],
        [(1, 4, 2)],
        [(1, 6, 1)],
    ]


def test_pages_that_nobody_wrote_take_no_memory() -> None:
    arena = Arena(1000, 1 << 20)
    assert os.fstat(arena.fd).st_blocks == 0
    arena.close()


def test_models_without_experts_are_refused(tmp_path: Path) -> None:
    folder = str(saved(tmp_path, "llama-8")[0])
    with pytest.raises(BadConfig, match="has no experts"):
        open_executor(folder, replace(ENGINE, expert_devices=2))
