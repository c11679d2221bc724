"""Decode steps on fixed memory, padded to a few sizes. Without a GPU a "recording" runs the same code again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from penstock.core.types import Sampling
from penstock.engine.torch.build import EngineConfig
from penstock.engine.torch.cuda.graphs import DecodeGraphs, Play, batch_sizes
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.open import open_executor
from penstock.engine.torch.step import StepArrays
from tests.engine.torch.driver import Driver
from tests.engine.torch.models import saved

BLOCKS = 40
PROMPTS = [[5, 6, 7], [9] * 20, [3, 1, 4, 1, 5], [8] * 33, [2, 7]]


class Again:
    """The recorder of machines without a GPU."""

    def __init__(self) -> None:
        self.plays = 0

    def record(self, run: Callable[[], None]) -> Play:
        def play() -> None:
            self.plays += 1
            run()

        play()
        return play


async def texts(executor: TorchExecutor, sampling: Sequence[Sampling]) -> list[list[int]]:
    driver = Driver(executor)
    jobs = [driver.job(ids, how) for ids, how in zip(PROMPTS, sampling, strict=True)]
    for count, some in ((4, jobs[:1]), (6, jobs[:4]), (20, jobs)):  # batches of 1, 4 and 5
        await driver.finish(some, count)
    await executor.stop()
    return [job.outputs for job in jobs]


def opened(root: Path, name: str, spare: int = 0) -> TorchExecutor:
    folder, _ = saved(root, name)
    config = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=BLOCKS + spare)
    return open_executor(folder, config)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
async def test_the_text_is_the_same(model_root: Path, name: str) -> None:
    greedy = Sampling(temperature=0.0, ignore_eos=True)
    warm = Sampling(temperature=1.0, ignore_eos=True, seed=4, top_p=0.9)
    sampling = [greedy, warm, greedy, greedy, warm]
    wanted = await texts(opened(model_root, name), sampling)
    executor, recorder = opened(model_root, name, spare=1), Again()
    executor.num_blocks = BLOCKS
    with torch.inference_mode():
        executor._graphs = DecodeGraphs(
            executor._decoder,
            recorder,
            sizes=batch_sizes(3),
            max_context=BLOCKS * executor.block_size,
            block_size=executor.block_size,
            spare_block=BLOCKS,
            device=torch.device("cpu"),
        )
    assert await texts(executor, sampling) == wanted
    recorded = len(batch_sizes(3))
    assert recorder.plays > recorded + 3  # single jobs and fours; five are too many


def test_sizes() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(3) == [1, 2, 4]
    assert batch_sizes(20) == [1, 2, 4, 8, 16, 24]
    assert batch_sizes(128)[-1] == 128


def test_steps_that_are_not_played() -> None:
    ints = torch.zeros(2, dtype=torch.int64).numpy()
    step = StepArrays(
        ids=ints, positions=ints, rows=ints[:1], slots=ints,
        query_start=ints, context=ints, block_table=ints[:, None],
        max_query=1, max_context=1, num_sampling=1,
    )  # fmt: skip
    assert not step.is_plain_decode
    assert step._replace(rows=ints, num_sampling=2).is_plain_decode
    assert not step._replace(rows=ints, num_sampling=2, max_query=2).is_plain_decode
