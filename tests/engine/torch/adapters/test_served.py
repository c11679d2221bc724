"""Adapters through a whole replica: little memory, few slots, prompts that begin alike; each text is its model's."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock.core.events import AdapterLoaded, Finished
from penstock.core.types import Sampling
from penstock.engine.swap import SwapConfig
from penstock.engine.torch.build import EngineConfig
from tests.engine.torch.adapters.made import write_adapter
from tests.engine.torch.adapters.test_exact import greedy
from tests.engine.torch.models import saved
from tests.engine.torch.served import Served, Setting, serve

ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=1, max_adapters=2)
GREEDY = Sampling(temperature=0.0, ignore_eos=True, max_tokens=20)


def made(
    root: Path, place: Path
) -> tuple[Path, dict[str, Path], dict[str | None, torch.nn.Module]]:
    folder, model = saved(root, "qwen3")
    folders = {key: place / key for key in "abc"}
    models: dict[str | None, torch.nn.Module] = {None: model}
    for seed, (key, at) in enumerate(folders.items()):
        models[key] = write_adapter(at, model, targets="all-linear", rank=2 + seed, seed=seed)
    return folder, folders, models


def check(
    served: Served,
    models: dict[str | None, torch.nn.Module],
    asked: list[tuple[str | None, list[int]]],
) -> None:
    for at, (key, ids) in enumerate(asked):
        text, margin = greedy(models[key], ids, 20)
        assert served.ids(at) == text or margin < 1e-3, (key, margin)


@pytest.mark.parametrize("how", ["recomputed", "moved to host memory"])
async def test_more_adapters_than_slots_and_little_memory(
    model_root: Path, tmp_path: Path, how: str
) -> None:
    folder, folders, models = made(model_root, tmp_path)
    chance = random.Random(2)
    begin = [chance.randrange(3, 500) for _ in range(20)]
    keys = [None, "a", "b", "c", "a", "b", None, "c"]
    asked = [(key, [*begin, *[7 + at] * (3 * at)]) for at, key in enumerate(keys)]
    swap = SwapConfig(host_blocks=40 if how.startswith("moved") else 0)
    setting = Setting(budget=24, num_blocks=10, swap=swap)
    engine = replace(ENGINE, num_blocks=10, adapters=folders, host_blocks=swap.host_blocks)
    served = await serve(
        folder,
        [ids for _, ids in asked],
        setting,
        sampling=[GREEDY] * len(asked),
        engine=engine,
        adapters=[key for key, _ in asked],
    )
    check(served, models, asked)
    assert served.num_preemptions
    loads = [event.adapter for event in served.events if isinstance(event, AdapterLoaded)]
    assert set(loads) == set("abc")


async def test_cached_prefixes_are_an_adapters_own(model_root: Path, tmp_path: Path) -> None:
    """The same prompt of 40 tokens, one after the other: two blocks are found by those of the same adapter only."""
    folder, folders, models = made(model_root, tmp_path)
    ids = [3 + 7 * at for at in range(40)]
    keys = [None, "a", "b", None, "a", "b"]
    served = await serve(
        folder,
        [ids] * 6,
        Setting(is_alone=True),
        sampling=[GREEDY] * 6,
        engine=replace(ENGINE, num_blocks=256, adapters=folders),
        adapters=keys,
    )
    check(served, models, [(key, ids) for key in keys])
    cached = [event.num_cached for event in served.events if isinstance(event, Finished)]
    assert cached == [0, 0, 0, 32, 32, 32]
