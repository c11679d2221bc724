"""Decode steps on fixed memory, padded to a few sizes. Without a GPU a "recording" runs the same code again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.core.types import Sampling
from penstock.engine.folder import model_facts
from penstock.engine.torch.build import EngineConfig, build_decoder
from penstock.engine.torch.cuda import prompts
from penstock.engine.torch.cuda.graphs import DecodeGraphs, Play, Room, batch_sizes
from penstock.engine.torch.cuda.prompts import PromptGraphs
from penstock.engine.torch.decoder import Alone, Decoder
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.linear import Weights
from penstock.engine.torch.open import open_executor
from penstock.engine.torch.ports import ShardSpec
from penstock.engine.torch.step import StepArrays
from tests.engine.torch.driver import GREEDY, Driver
from tests.engine.torch.models import saved
from tests.engine.torch.test_against_transformers import logits_of

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


def room_of(executor: TorchExecutor) -> Room:
    size = executor.block_size
    return Room(BLOCKS * size, size, BLOCKS, torch.device("cpu"))


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
            room_of(executor),
            sizes=batch_sizes(3),
        )
    assert await texts(executor, sampling) == wanted
    recorded = len(batch_sizes(3))
    assert recorder.plays > recorded + 3  # single jobs and fours; five are too many


async def mixed(executor: TorchExecutor, budget: int) -> list[list[int]]:
    """Prompts in parts beside jobs that decode, more and fewer of them."""
    driver = Driver(executor)
    jobs = [driver.job(ids, GREEDY) for ids in PROMPTS]
    await driver.finish(jobs[:1], 3, budget)
    await driver.finish(jobs[:4], 5, budget)
    await driver.finish(jobs, 12, budget)
    await executor.stop()
    return [job.outputs for job in jobs]


@pytest.mark.parametrize("budget", [9, 50])
async def test_steps_with_prompts_are_the_same(
    model_root: Path, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of up to 32 tokens and 2 or 4 chunks; longer ones and fuller ones are not played."""
    monkeypatch.setattr(prompts, "CHUNKS", (2, 4))
    wanted = await mixed(opened(model_root, "qwen3"), budget)
    executor, recorder = opened(model_root, "qwen3", spare=1), Again()
    executor.num_blocks = BLOCKS
    room = room_of(executor)
    with torch.inference_mode():
        graphs = DecodeGraphs(executor._decoder, recorder, room, sizes=[1])
        made = PromptGraphs(executor._decoder, recorder, room, tokens=(8, 16, 32))
    assert made.sizes == [8, 16, 32]
    graphs.prompts = made
    executor._graphs, recorded = graphs, recorder.plays
    assert await mixed(executor, budget) == wanted
    assert recorder.plays > recorded + 10


class Cramped(Again):
    """Has no memory for steps of more than 16 rows."""

    def record(self, run: Callable[[], None]) -> Play:
        self.plays += 1
        if self.plays <= 4:  # the two largest, each with few and many chunks
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().record(run)


def test_steps_that_memory_does_not_suffice_for_are_not_recorded(model_root: Path) -> None:
    executor = opened(model_root, "qwen3", spare=1)
    with torch.inference_mode():
        made = PromptGraphs(executor._decoder, Cramped(), room_of(executor), tokens=(8, 16, 32, 64))
    assert made.sizes == [8, 16]
    asyncio.run(executor.stop())


class Choosy(Again):
    """Has no memory for 16 tokens of many chunks, nor for 8 tokens of few."""

    def __init__(self) -> None:
        super().__init__()
        self.tried = 0

    def record(self, run: Callable[[], None]) -> Play:
        self.tried += 1
        if self.tried in (1, 4):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().record(run)


async def test_sizes_that_were_recorded_for_some_numbers_of_chunks_only(
    model_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "CHUNKS", (2, 4))
    wanted = await mixed(opened(model_root, "qwen3"), 14)
    executor = opened(model_root, "qwen3", spare=1)
    executor.num_blocks = BLOCKS
    room, recorder = room_of(executor), Choosy()
    with torch.inference_mode():
        graphs = DecodeGraphs(executor._decoder, Again(), room, sizes=[1])
        graphs.prompts = PromptGraphs(executor._decoder, recorder, room, tokens=(8, 16))
    executor._graphs, recorded = graphs, recorder.plays
    assert await mixed(executor, 14) == wanted
    assert recorder.plays > recorded


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
    assert step.wants_next_tokens and not step._replace(rows=ints).wants_next_tokens
    assert not step._replace(rows=ints, num_sampling=2, max_query=2).is_plain_decode


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        *(("qwen3", weights) for weights in ("stored", "int8", "int4")),
        *(("gemma2", weights) for weights in ("stored", "int8", "int4")),
        ("qwen3-moe", "stored"),
        ("deepseek-v3", "stored"),
    ],
)
async def test_played_on_cuda(model_root: Path, name: str, weights: Weights) -> None:
    """What is played, what is not, and the CPU's portable operations on the same weights say the same."""
    torch.backends.cuda.matmul.allow_tf32 = False
    folder, _ = saved(model_root, name)
    greedy = [Sampling(temperature=0.0, ignore_eos=True)] * len(PROMPTS)
    found, loads = [], []
    for device, graphs in (("cuda", "auto"), ("cuda", "off"), ("cpu", "off")):
        config = EngineConfig(
            device=device, dtype="fp32", threads=1, num_blocks=BLOCKS, weights=weights,
            graphs=graphs, graph_batch=4, linear="plain" if device == "cpu" else "auto",
        )  # fmt: skip
        if device == "cpu" and weights != "stored":
            continue  # rows are not quantised on CUDA, so their text may differ
        executor = open_executor(str(folder), config)
        assert (executor._graphs is not None) == (graphs == "auto")
        has_experts = executor.expert_loads is not None
        assert executor._graphs is None or (executor._graphs.prompts is None) == has_experts
        loads.append(executor.expert_loads.total if has_experts else [])  # type: ignore[union-attr]
        found.append(await texts(executor, greedy))
    assert all(each == found[0] for each in found)
    assert all(each == loads[0] for each in loads)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_few_bits_on_cuda_are_the_quantised_weights(model_root: Path, weights: Weights) -> None:
    """Logits of a prompt, and of its last token alone, beside the same codes as fp32 numbers."""
    torch.backends.cuda.matmul.allow_tf32 = False
    folder, _ = saved(model_root, "qwen3")
    found = []
    for expand in (False, True):
        config = EngineConfig(device="cuda", dtype="fp32", num_blocks=BLOCKS, weights=weights)
        built = build_decoder(model_facts(folder), replace(config, graphs="off"), Alone(), None)
        assert "packed" in built.notes["linear"]
        if expand:
            _expand(built.decoder)
        ids = np.arange(40) * 7 % 90
        with torch.inference_mode():
            logits_of(built, ids, 0, 39)
            found.append((logits_of(built, ids, 0, 40), logits_of(built, ids, 39, 40)))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def _expand(decoder: Decoder) -> None:
    from penstock.engine.torch.cuda.linear import PackedCodes
    from penstock.engine.torch.linear import PlainLinear

    def plain(layer: object) -> object:
        assert isinstance(layer, PackedCodes)
        wide = layer.numbers(torch.float32)
        return PlainLinear().pack(wide, layer.bias, ShardSpec())

    for layer in decoder.layers:
        layer.attention.qkv, layer.attention.out = map(
            plain, (layer.attention.qkv, layer.attention.out)
        )
        layer.mlp.gate_up, layer.mlp.down = map(plain, (layer.mlp.gate_up, layer.mlp.down))
    decoder.head = plain(decoder.head)
