"""One team of threads a lane, at the priority that was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from penstock.cluster.spec import ExecutorSpec
from penstock.engine.torch.build import EngineConfig
from penstock.engine.torch.open import open_executor
from tests.engine.torch.driver import GREEDY, Driver
from tests.engine.torch.models import saved

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")


def threads_here() -> dict[int, int]:
    """Niceness of each thread of this process."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        found[int(task.name)] = os.getpriority(os.PRIO_PROCESS, int(task.name))
    return found


@pytest.mark.parametrize("niceness", [0, 7])
async def test_the_lane_and_its_team_step_back(model_root: Path, niceness: int) -> None:
    """bf16 rows of a step wide enough for a parallel region; nobody else's priority changes."""
    folder = str(saved(model_root, "qwen3")[0])
    before = threads_here()
    config = EngineConfig(
        device="cpu", dtype="bf16", num_blocks=64, threads=2, niceness=niceness, packed_cache="off"
    )
    executor = open_executor(folder, config)
    driver = Driver(executor)
    job = driver.job(list(range(3, 303)), GREEDY)
    await driver.step([(job, 300)])
    new = {task: nice for task, nice in threads_here().items() if task not in before}
    lane = executor._lanes[0]._thread
    wanted = max(niceness, os.getpriority(os.PRIO_PROCESS, 0))  # of a nice test run
    assert new[lane.native_id or 0] == wanted
    assert set(new.values()) == {wanted}
    assert len(new) <= 2, "a lane of two threads has itself and one more"
    assert {task: threads_here()[task] for task in before} == before
    await executor.stop()


@pytest.mark.parametrize("told", [-1, 20])
def test_priorities_that_do_not_exist_are_refused(told: int) -> None:
    with pytest.raises(ValueError, match="niceness"):
        EngineConfig(niceness=told)
    with pytest.raises(ValueError, match="niceness"):
        ExecutorSpec(niceness=told)
