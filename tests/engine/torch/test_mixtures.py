"""Mixtures of experts: routing equal to transformers' own, counts exact, and only chosen rows multiplied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from penstock.core.errors import BadModel
from penstock.engine.folder import model_facts, read_json
from penstock.engine.torch.build import EngineConfig, build_decoder
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.families import read_shape
from penstock.engine.torch.load import check_split
from penstock.engine.torch.mlp import Mixture, Taken
from penstock.engine.torch.open import open_executor
from tests.engine.torch.driver import GREEDY, Driver
from tests.engine.torch.models import MIXTURES, saved
from tests.engine.torch.test_against_transformers import logits_of

ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=40)
PROMPT = [3 + (11 * at) % 500 for at in range(60)]


Routes = dict[int, tuple[Tensor, Tensor]]  # layer -> (experts, weights), [T, top_k]


def routes_of(model: PreTrainedModel, ids: list[int]) -> Routes:
    """What each layer's router of the reference chooses for these tokens."""
    found: Routes = {}

    def hook(index: int):  # type: ignore[no-untyped-def]
        def noted(module: object, inputs: object, out: tuple[Tensor, Tensor, Tensor]) -> None:
            found[index] = (out[2], out[1])

        return noted

    gates = [getattr(layer.mlp, "gate", None) for layer in model.model.layers]
    hooks = [
        gate.register_forward_hook(hook(index))
        for index, gate in enumerate(gates)
        if gate is not None
    ]
    with torch.inference_mode():
        model(torch.tensor([ids]))
    for one in hooks:
        one.remove()
    return found


def by_expert(chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    order = chosen.argsort(1)
    return chosen.gather(1, order), weights.gather(1, order)


def distinct(routes: Routes, rows: slice = slice(None)) -> dict[int, int]:
    return {layer: len(chosen[rows].unique()) for layer, (chosen, _) in routes.items()}


@pytest.mark.parametrize("name", MIXTURES)
def test_routes_are_the_references(
    model_root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same experts, the same weights, in every layer that has experts."""
    folder, model = saved(model_root, name)
    built = build_decoder(model_facts(folder), ENGINE, Alone(), None)
    routes, ours = routes_of(model, PROMPT), {}
    choose = Mixture.choose

    def noted(self: Mixture, told: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ours[self.layer] = choose(self, told, dtype)
        return ours[self.layer]

    monkeypatch.setattr(Mixture, "choose", noted)
    with torch.inference_mode():
        logits_of(built, torch.tensor(PROMPT).numpy(), 0, len(PROMPT))
    assert ours.keys() == routes.keys()
    for layer, (chosen, weights) in ours.items():
        theirs = by_expert(*routes[layer])
        chosen, weights = by_expert(chosen, weights)
        assert torch.equal(chosen, theirs[0]), f"layer {layer}"
        assert (weights - theirs[1]).abs().max() < 1e-5


@pytest.mark.parametrize("name", MIXTURES)
async def test_loads_are_counted_exactly(model_root: Path, name: str) -> None:
    """By layer and step, against what the reference's routers chose for the same rows."""
    folder, model = saved(model_root, name)
    routes = routes_of(model, PROMPT)
    executor = open_executor(str(folder), ENGINE)
    driver, loads = Driver(executor), executor.expert_loads
    assert loads is not None
    job = driver.job(PROMPT, GREEDY)
    borders = (0, 1, 17, 60)
    for first, end in zip(borders, borders[1:], strict=False):
        await driver.step([(job, end - first)])
        plan, touched = loads.recent[-1]
        assert plan == driver.plans
        assert touched == distinct(routes, slice(first, end))
    assert loads.num_steps == 3
    summed = [
        sum(step.get(layer, 0) for _, step in loads.recent) for layer in range(len(loads.total))
    ]
    assert loads.total == summed
    for layer, (chosen, _) in routes.items():
        counts = chosen.flatten().bincount(minlength=loads.taken.shape[1])
        assert loads.taken[layer].tolist() == counts.tolist()
    config = read_json(folder / "config.json")
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    assert loads.each_bytes == 3 * 64 * int(str(width)) * 4
    assert loads.num_bytes == sum(summed) * loads.each_bytes
    await executor.stop()


async def test_dense_models_count_nothing(model_root: Path) -> None:
    executor = open_executor(str(saved(model_root, "qwen3")[0]), ENGINE)
    assert executor.expert_loads is None
    await executor.stop()


def test_only_routed_rows_are_multiplied(model_root: Path) -> None:
    """Every expert is called at most once a step, with exactly the rows that chose it."""
    folder, _ = saved(model_root, "qwen3-moe")
    mixture = build_decoder(model_facts(folder), ENGINE, Alone(), None).decoder.layers[1].mlp
    assert isinstance(mixture, Mixture)
    seen: dict[int, Tensor] = {}

    def watched(index: int, expert):  # type: ignore[no-untyped-def]
        def call(x: Tensor, taken: Taken) -> Tensor:
            assert index not in seen
            seen[index] = x
            return expert(x, taken)

        return call

    mixture.experts = [watched(*pair) for pair in enumerate(mixture.experts)]
    x = torch.randn(5, 64)
    with torch.inference_mode():
        chosen, _ = mixture.route(x)
        mixture(x, taken := {})
    assert set(seen) == set(chosen.flatten().tolist())
    assert taken == {1: [len(seen.get(expert, ())) for expert in range(16)]}
    for index, rows in seen.items():
        assert torch.equal(rows, x[(chosen == index).any(1)])


def test_configurations(model_root: Path) -> None:
    config = read_json(saved(model_root, "qwen3-moe")[0] / "config.json")
    told = read_shape(config, "c").experts
    assert told is not None and (told.count, told.top_k, told.is_normed) == (16, 4, True)
    assert told.layers == (True, True, True)
    silent = {key: value for key, value in config.items() if key != "norm_topk_prob"}
    assert not read_shape(silent, "c").experts.is_normed  # type: ignore[union-attr]
    renamed = {**config, "num_experts": 16, "num_local_experts": None}
    assert read_shape(renamed, "c").experts == told
    assert read_shape({**config, "mlp_only_layers": [0, 1, 2]}, "c").experts is None
    with pytest.raises(BadModel, match="cannot take 17 of 16"):
        read_shape({**config, "num_experts_per_tok": 17}, "c")
    with pytest.raises(BadModel, match="mlp_only_layers"):
        read_shape({**config, "mlp_only_layers": 3}, "c")
    shape = read_shape(config, "c")
    check_split(shape, 2, "c")
    with pytest.raises(BadModel, match="width of an expert"):
        check_split(replace(shape, experts=replace(told, width=33)), 2, "c")
