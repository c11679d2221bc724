"""Tensor parallel processes: no rank outlives its executor, and a dead one is told, not waited for."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock.core.drafts import Speculation
from penstock.core.errors import StepFailed
from penstock.engine.torch.crew import config_of, told_of
from penstock.engine.torch.open import EngineConfig, open_executor
from tests.engine.torch.driver import GREEDY, Driver
from tests.engine.torch.models import saved

ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=16, tensor_parallel=2)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.timeout(60)
async def test_a_dead_rank_is_told(model_root: Path) -> None:
    folder, _ = saved(model_root, "qwen3")
    executor = open_executor(str(folder), ENGINE)
    (pid,) = executor.pids
    assert executor.caps.yield_grain == "step" and not executor.caps.has_layer_ranges
    driver = Driver(executor)
    job = driver.job(list(range(5, 25)), GREEDY)
    await driver.finish([job], 3)
    os.kill(pid, signal.SIGKILL)
    done = await driver.step([(job, 1)])
    assert done.error is not None and "process of this model died" in done.error
    with pytest.raises(StepFailed, match="process of this model died"):  # nobody runs on in vain
        await driver.step([(job, 1)])
    await asyncio.wait_for(executor.stop(), 20)
    assert not is_running(pid)


@pytest.mark.timeout(60)
async def test_scores_and_a_clean_end(model_root: Path) -> None:
    """The head is split over the ranks too; stopping ends them all."""
    folder, model = saved(model_root, "qwen3")
    executor = open_executor(str(folder), ENGINE)
    driver = Driver(executor)
    score = driver.job([5, 6, 7], GREEDY, kind="score")
    other = driver.job([5, 6, 7, 8], replace(GREEDY, logprobs=2))
    await driver.step([(score, 3), (other, 4)])
    with torch.inference_mode():
        want = model(torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)
    scored = [entry.logprob for entry in score.sampled[0].prompt_logprobs if entry is not None]
    assert scored == pytest.approx([float(want[0, 6]), float(want[1, 7])], abs=1e-4)
    (entry,) = other.sampled[0].logprobs
    assert entry.logprob == pytest.approx(float(want[3].max()), abs=1e-4)
    (pid,) = executor.pids
    await asyncio.wait_for(executor.stop(), 20)
    assert not is_running(pid)


def test_every_setting_reaches_the_other_ranks() -> None:
    config = EngineConfig(
        tensor_parallel=2,
        kernel_cache=Path("/cache/kernels"),
        cache_dir=Path("/cache/hub"),
        adapters={"tiny": Path("/adapters/tiny")},
        speculation=Speculation(max_drafts=3, acceptance=(0.5, 0.25)),
        weights="int8",
    )
    assert config_of(told_of(config)) == config
