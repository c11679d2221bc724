"""Models whose weights are brought to 8 or 4 bits when they are loaded.

Held to the same model with its few-bit weights made numbers again: what differs is that rows are quantised too. And a
text does not depend on how it was cut into steps: sums of bytes are exact, so a row's result is the same among others.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.core.types import Sampling
from penstock.engine.folder import model_facts
from penstock.engine.torch import kernels, linear
from penstock.engine.torch.build import EngineConfig, build_decoder
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.kernels.quantised import PackedFewBits
from penstock.engine.torch.mlp import Mixture
from penstock.engine.torch.open import open_executor
from penstock.engine.torch.packed_file import ALIGNMENT, put_together, take_apart
from tests.engine.torch.models import saved
from tests.engine.torch.served import Setting, serve
from tests.engine.torch.test_against_transformers import ENGINE, logits_of, prompts

FEW: tuple[linear.Weights, ...] = ("int8", "int4")
MODELS = ("qwen3", "qwen3-moe", "deepseek-lite")
QUICK = (("qwen3", "int8"), ("qwen3-moe", "int4"))
CUT = [
    pytest.param(name, few, marks=() if (name, few) in QUICK else pytest.mark.slow)
    for name in MODELS
    for few in FEW
]
needs_kernels = pytest.mark.skipif(not kernels.available(), reason=str(kernels.why_not()))


def config(weights: linear.Weights) -> EngineConfig:
    return replace(ENGINE, weights=weights, num_blocks=40)


@needs_kernels
@pytest.mark.parametrize("weights", FEW)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_same_weights_as_numbers(
    model_root: Path, name: str, weights: linear.Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, ids = model_facts(saved(model_root, name)[0]), np.array(prompts()[5])
    stored = logits_of(build_decoder(facts, config("stored"), Alone(), None), ids, 0, len(ids))
    built = build_decoder(facts, config(weights), Alone(), None)
    packed = logits_of(built, ids, 0, len(ids))
    monkeypatch.setattr(linear, "available", lambda: False)
    other = build_decoder(facts, config(weights), Alone(), None)
    assert "no compiled kernel" in other.notes["linear"]
    numbers = logits_of(other, ids, 0, len(ids))
    apart, lost = (off(packed, numbers), off(stored, numbers))
    assert apart < 0.05 and apart < lost + 0.02


def off(some: torch.Tensor, others: torch.Tensor) -> float:
    """The middle row's error: where a router was of two minds, a row may pass other experts."""
    return float(((some - others).norm(dim=1) / others.norm(dim=1)).median())


@needs_kernels
@pytest.mark.parametrize(("name", "weights"), CUT)
async def test_a_text_is_the_same_in_any_steps(
    model_root: Path, name: str, weights: linear.Weights
) -> None:
    folder, _ = saved(model_root, name)
    asked = prompts()
    greedy = [Sampling(temperature=0.0, ignore_eos=True, max_tokens=24)] * len(asked)
    alone = Setting(is_alone=True, has_prefix_cache=False, budget=256)
    texts = []
    for setting in (alone, Setting(budget=19, num_blocks=22)):
        engine = replace(config(weights), num_blocks=setting.num_blocks)
        served = await serve(folder, asked, setting, sampling=greedy, engine=engine)
        assert setting is alone or served.num_preemptions
        texts.append([served.ids(at) for at in range(len(asked))])
    assert texts[1] == texts[0]


@needs_kernels
def test_heads_have_eight_bits_and_routers_all_of_theirs(model_root: Path) -> None:
    built = build_decoder(
        model_facts(saved(model_root, "qwen3-moe")[0]), config("int4"), Alone(), None
    )
    decoder = built.decoder
    assert isinstance(decoder.head, PackedFewBits) and decoder.head.bits == 8
    mixture = decoder.layers[-1].mlp
    assert isinstance(mixture, Mixture) and not isinstance(mixture.router, PackedFewBits)
    down = mixture.experts[0].down
    assert isinstance(down, PackedFewBits) and down.bits == 4
    assert built.notes["weights"].startswith("int4")


@needs_kernels
async def test_loads_of_experts_are_counted_in_their_bytes(model_root: Path) -> None:
    folder = str(saved(model_root, "qwen3-moe")[0])
    sizes = {}
    for weights in ("stored", *FEW):
        executor = open_executor(folder, config(weights))
        assert executor.expert_loads is not None
        sizes[weights] = executor.expert_loads.each_bytes
        await executor.stop()
    assert sizes["int4"] < 0.2 * sizes["stored"] and 0.25 <= sizes["int8"] / sizes["stored"] < 0.27


def test_bias_and_plain_products(model_root: Path) -> None:
    """Biases, and torch's own product where it was asked for."""
    facts, ids = model_facts(saved(model_root, "qwen2")[0]), np.array(prompts()[4])
    asked = replace(config("int8"), linear="plain")
    built = build_decoder(facts, asked, Alone(), None)
    assert built.notes["linear"] == "int8-expanded: asked for"
    plain = logits_of(built, ids, 0, len(ids))
    packed = logits_of(build_decoder(facts, config("int8"), Alone(), None), ids, 0, len(ids))
    assert off(packed, plain) < 0.05


@needs_kernels
def test_what_was_packed_is_kept_and_read_again(model_root: Path, tmp_path: Path) -> None:
    facts, ids = model_facts(saved(model_root, "qwen3")[0]), np.array(prompts()[4])
    built = build_decoder(facts, config("int4"), Alone(), None)
    wanted = logits_of(built, ids, 0, len(ids))
    layer = built.decoder.layers[0]
    head, tensors = take_apart(layer.attention.out, None)  # type: ignore[attr-defined]
    with (tmp_path / "packed").open("wb") as file:
        file.write(head)
        for tensor in tensors:
            file.seek(-file.tell() % ALIGNMENT, 1)
            tensor.flatten().view(torch.uint8).numpy().tofile(file)
    again = put_together(tmp_path / "packed", None)
    assert isinstance(again, PackedFewBits)
    layer.attention.out = again  # type: ignore[attr-defined]
    assert logits_of(built, ids, 0, len(ids)).equal(wanted)
