"""An adapter's answers are those of the model into whose weights it is merged, whoever else is in the step."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.core.plans import Adapted
from penstock.engine.folder import model_facts
from penstock.engine.torch import kernels
from penstock.engine.torch.adapters.rows import rows_of
from penstock.engine.torch.adapters.store import AdapterStore
from penstock.engine.torch.build import Built, EngineConfig, build_decoder
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.open import open_executor
from penstock.engine.torch.step import StepArrays
from tests.engine.torch.adapters.made import ATTENTION, MLP, write_adapter
from tests.engine.torch.driver import Driver, Held
from tests.engine.torch.models import saved

ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=80)
IDS = np.array([3 + (11 * at) % 500 for at in range(60)])
FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "usual": ("qwen3", dict(targets=("q_proj", "v_proj"))),
    "all": ("llama-biased", dict(targets="all-linear", rank=7, alpha=5)),
    "pattern": ("gemma3", dict(targets=r".*\.layers\.[02]\.(self_attn\.k_proj|mlp\.up_proj)")),
    "stabilised": ("qwen2", dict(targets=tuple(ATTENTION), use_rslora=True, rank=9)),
    "ranks": (
        "qwen3",
        dict(
            targets=(*ATTENTION, *MLP),
            rank_pattern={"k_proj": 2, "down_proj": 12},
            alpha_pattern={"v_proj": 3, "down_proj": 1},
        ),
    ),
    "merged-parts": ("phi3", dict(targets=("qkv_proj", "gate_up_proj", "o_proj"))),
    "no-gate": ("phi", dict(targets=("q_proj", "dense", "fc1", "fc2"))),
    "attention-of-a-mixture": ("qwen3-moe", dict(targets=tuple(ATTENTION))),
    "stored-in-bf16": ("qwen3", dict(targets="all-linear", dtype=torch.bfloat16)),
}


def logits_with(built: Built, slot: int | None, first: int, last: int) -> torch.Tensor:
    positions = np.arange(first, last)
    blocks = np.array([(7 * place) % 40 for place in range(-(-last // 16))], np.int32)
    arrays = StepArrays(
        ids=IDS[first:last],
        positions=positions,
        rows=np.arange(last - first),
        slots=blocks[positions // 16].astype(np.int64) * 16 + positions % 16,
        query_start=np.array([0, last - first], np.int32),
        context=np.array([last], np.int32),
        block_table=blocks[None],
        max_query=last - first,
        max_context=last,
        num_sampling=last - first,
        adapters=(slot,),
    )
    steps = built.decoder.forward(arrays.on(built.device))
    with torch.inference_mode():
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return built.decoder.logits(end.value)


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_the_merged_models(model_root: Path, tmp_path: Path, form: str) -> None:
    """Within 1e-5 of what logits vary by, in one chunk and in chunks short enough to be grouped by rows."""
    family, config = FORMS[form]
    folder, model = saved(model_root, family)
    merged = write_adapter(tmp_path / "a", model, **config)  # type: ignore[arg-type]
    built = build_decoder(model_facts(folder), ENGINE, Alone(), None)
    store = AdapterStore(
        built.decoder, slots=3, rank=16, device=built.device, folders={"a": tmp_path / "a"}
    )
    store._fill("a", 1)
    with torch.inference_mode():
        want, base = (each(torch.tensor(IDS)[None]).logits[0] for each in (merged, model))
    bound = 1e-5 * float(want.std())
    for size in (60, 5):
        pieces = [logits_with(built, 1, at, at + size) for at in range(0, 60, size)]
        assert rms(torch.cat(pieces) - want) < bound
    assert rms(logits_with(built, None, 0, 60) - base) < bound
    assert rms(want - base) > 1000 * bound


def test_an_adapter_that_needs_new_arrays(model_root: Path, tmp_path: Path) -> None:
    """Steps were recorded with arrays for two products; the next adapter changes all of them."""
    folder, model = saved(model_root, "qwen3")
    wanted = {
        "a": write_adapter(tmp_path / "a", model, targets=("q_proj", "v_proj"), seed=1),
        "b": write_adapter(tmp_path / "b", model, targets="all-linear", seed=2),
    }
    built = build_decoder(model_facts(folder), ENGINE, Alone(), None)
    folders = {key: tmp_path / key for key in wanted}
    store = AdapterStore(built.decoder, slots=3, rank=16, device=built.device, folders=folders)
    for slot, key in ((1, "a"), (2, "b"), (1, "a")):
        store._fill(key, slot)
        with torch.inference_mode():
            want = wanted[key](torch.tensor(IDS[:20])[None]).logits[0]
        assert rms(logits_with(built, slot, 0, 20) - want) < 1e-5 * float(want.std())


def test_all_that_they_add_to_few_rows_is_native(model_root: Path, tmp_path: Path) -> None:
    if not kernels.available() or not kernels.linear.wins_on_this_machine(torch.bfloat16):
        pytest.skip("this processor multiplies bfloat16 with another library")
    folder, model = saved(model_root, "qwen3")
    write_adapter(tmp_path / "a", model, targets="all-linear")
    config = replace(ENGINE, dtype="bf16")
    built = build_decoder(model_facts(folder), config, Alone(), None)
    store = AdapterStore(
        built.decoder, slots=3, rank=16, device=built.device, folders={"a": tmp_path / "a"}
    )
    store._fill("a", 1)
    decoder = built.decoder
    with torch.inference_mode():
        rows = rows_of((1, None), [0, 5, 6], built.device)
        assert decoder.spaces is not None and rows is not None
        space = decoder.spaces.find(decoder.embed(torch.tensor(IDS[:6])), rows)
        assert space is not None and space.program.num_python == 0
        assert space.program.num_native == 2 * len(decoder.layers)  # one call a piece
    recorded, without = (logits_with(built, slot, 0, 20) for slot in (1, None))
    decoder.spaces = None
    plain = logits_with(built, 1, 0, 20)
    assert rms(recorded - plain) < 0.02 * rms(plain) < rms(recorded - without)


def greedy(model: torch.nn.Module, ids: list[int], count: int) -> tuple[list[int], float]:
    """The text, and how clearly its least clear token won."""
    margin, ids = float("inf"), list(ids)
    start = len(ids)
    with torch.inference_mode():
        for _ in range(count):
            best = model(torch.tensor(ids)[None]).logits[0, -1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            ids.append(int(best.indices[0]))
    return ids[start:], margin


async def loaded(executor: TorchExecutor, driver: Driver, slots: dict[str, int]) -> None:
    for key, slot in slots.items():
        executor.load_adapter(key, slot)
        told = await asyncio.wait_for(driver.told.get(), 20)
        assert isinstance(told, Adapted) and told.error is None, told


@pytest.mark.parametrize("lanes", [1, 2])
async def test_several_in_one_step(model_root: Path, tmp_path: Path, lanes: int) -> None:
    """Three adapters and the base, prefills among decodes, one job preempted: each text is its own model's."""
    folder, model = saved(model_root, "qwen3")
    folders, merged = {}, {None: model}
    for at, key in enumerate("abc"):
        folders[key] = tmp_path / key
        targets = (("q_proj", "v_proj"), "all-linear", tuple(MLP))[at]
        merged[key] = write_adapter(folders[key], model, targets=targets, rank=3 + at, seed=at)
    config = replace(ENGINE, max_adapters=5, adapters=folders, lanes=lanes)
    executor = open_executor(str(folder), config)
    driver = Driver(executor)
    await loaded(executor, driver, {"a": 0, "b": 1, "c": 4})
    jobs: list[Held] = []
    for at, key in enumerate(("a", None, "b", "c", "a", None)):
        ids = [3 + (7 * at + 5 * place) % 500 for place in range(4 + 9 * at)]
        jobs.append(driver.job(ids, adapter=key))
    await driver.finish(jobs[:3], 4, budget=24)
    driver.preempt(jobs[2])
    await driver.finish(jobs, 12, budget=24)
    await executor.stop()
    for job in jobs:
        model_of = merged[job.request.adapter]
        prompt = list(job.request.prompt.ids)  # type: ignore[attr-defined]
        text, margin = greedy(model_of, prompt, 12)
        assert job.outputs == text or margin < 1e-3, (job.request.adapter, margin)
    assert len({tuple(job.outputs) for job in jobs}) == len(jobs)


async def test_a_slot_is_given_to_another(model_root: Path, tmp_path: Path) -> None:
    """What the first one left (a higher rank, other layers) does not show."""
    folder, model = saved(model_root, "qwen3")
    write_adapter(tmp_path / "a", model, targets="all-linear", rank=9)
    merged = write_adapter(tmp_path / "b", model, targets=("k_proj",), rank=2, alpha=40, seed=5)
    folders = {"a": tmp_path / "a", "b": tmp_path / "b"}
    executor = open_executor(str(folder), replace(ENGINE, max_adapters=1, adapters=folders))
    driver = Driver(executor)
    await loaded(executor, driver, {"a": 0})
    await loaded(executor, driver, {"b": 0})
    job, late = driver.job([5, 6, 7], adapter="b"), driver.job([5, 6, 7], adapter="a")
    await driver.finish([job], 8)
    assert job.outputs == greedy(merged, [5, 6, 7], 8)[0]
    done = await driver.step([(late, 3)])
    assert "no adapter 'a'" in (done.outputs[0].error or "")
    await executor.stop()


@pytest.mark.parametrize("linear", ["auto", "plain"])
async def test_bf16_weights(model_root: Path, tmp_path: Path, linear: str) -> None:
    """As near to the exact merged model as the base is to the exact base."""
    folder, model = saved(model_root, "qwen3")
    merged = write_adapter(tmp_path / "a", model, targets="all-linear", dtype=torch.bfloat16)
    config = replace(ENGINE, dtype="bf16", linear=linear)
    built = build_decoder(model_facts(folder), config, Alone(), None)
    store = AdapterStore(
        built.decoder, slots=1, rank=16, device=built.device, folders={"a": tmp_path / "a"}
    )
    store._fill("a", 0)
    with torch.inference_mode():
        want, base = (each(torch.tensor(IDS)[None]).logits[0] for each in (merged, model))
    with_it = (logits_with(built, 0, 0, 60) - want).square().mean() / want.square().mean()
    without = (logits_with(built, None, 0, 60) - base).square().mean() / base.square().mean()
    assert with_it < 2 * without


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_base_in_few_bits(model_root: Path, tmp_path: Path, weights: str) -> None:
    """As near to the exact merged model as the base in few bits is to the exact base."""
    folder, model = saved(model_root, "qwen3")
    merged = write_adapter(tmp_path / "a", model, targets="all-linear", alpha=2)
    config = replace(ENGINE, weights=weights)  # type: ignore[arg-type]
    built = build_decoder(model_facts(folder), config, Alone(), None)
    store = AdapterStore(
        built.decoder, slots=1, rank=16, device=built.device, folders={"a": tmp_path / "a"}
    )
    store._fill("a", 0)
    with torch.inference_mode():
        want, base = (each(torch.tensor(IDS)[None]).logits[0] for each in (merged, model))
    with_it, without = logits_with(built, 0, 0, 60), logits_with(built, None, 0, 60)
    assert rms(without - base) > 1e-3  # it is in few bits
    assert rms(with_it - want) / rms(want) < 1.5 * rms(without - base) / rms(base)
