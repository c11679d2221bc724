"""Families that differ from Llama: sizes as published, parameters as in transformers, windows and latents priced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from penstock.core.errors import BadConfig
from penstock.cost.hardware import card_of
from penstock.cost.nano_times import RooflineTimes
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import ModelShape, shape_of, shape_of_config
from penstock.cost.step import StepFeatures, features_of
from penstock.cost.work import read_params, work_of

CARD = card_of("a100-80g")
KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
)  # fmt: skip


def config(kind: str, sizes: tuple[int, ...], **more: object) -> dict[str, object]:
    return {
        "model_type": kind,
        **dict(zip(KEYS, sizes, strict=True)),
        "torch_dtype": "bfloat16",
        **more,
    }


LITE = config(
    "deepseek_v2", (2048, 27, 16, 16, 10944, 102400), kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=1, n_routed_experts=64, n_shared_experts=2,
    num_experts_per_tok=6, moe_intermediate_size=1408, max_position_embeddings=163840,
)  # fmt: skip
GEMMA_3 = config(
    "gemma3_text", (1152, 26, 4, 1, 6912, 262144), head_dim=256, sliding_window=512,
    sliding_window_pattern=6, max_position_embeddings=32768,
)  # fmt: skip
PHI_3 = config("phi3", (3072, 32, 32, 32, 8192, 32064), max_position_embeddings=4096)
PUBLISHED = {  # parameters that the publishers' safetensors indices add up to
    "gemma-2-2b": (config("gemma2", (2304, 26, 8, 4, 9216, 256000), head_dim=256), 2_614_341_888),
    "gemma-2-9b": (config("gemma2", (3584, 42, 16, 8, 14336, 256000), head_dim=256), 9_241_705_984),
    "gemma-3-1b": (GEMMA_3, 999_885_952),
    "phi-2": (config("phi", (2560, 32, 32, 32, 10240, 51200)), 2_779_683_840),
    "phi-3-mini": (PHI_3, 3_821_079_552),
    "phi-4-mini": (
        config("phi3", (3072, 32, 24, 8, 8192, 200064), tie_word_embeddings=True), 3_836_021_760
    ),
    "deepseek-v2-lite": (LITE, 15_706_484_224),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name: str) -> None:
    told, params = PUBLISHED[name]
    assert shape_of_config(told, name).params == params


def test_presets_are_what_the_files_say() -> None:
    lite, gemma = shape_of("deepseek-v2-lite"), shape_of("gemma-2-9b")
    assert lite == shape_of_config(LITE, lite.name)
    told = {**PUBLISHED["gemma-2-9b"][0], "max_position_embeddings": 8192}
    assert gemma == shape_of_config(told, gemma.name)
    assert (lite.kv_pieces, gemma.kv_pieces) == (27, 84)


def test_parameters_equal_those_of_transformers(tmp_path: Path) -> None:
    """Every small model that the engine is tested with, whichever its layers."""
    pytest.importorskip("transformers")
    import torch

    from tests.engine.torch.models import FAMILIES, SIZE

    for name, (model_class, config_class, changes) in FAMILIES.items():
        made = config_class(**{**SIZE, **changes})
        made.save_pretrained(tmp_path / name)
        told = json.loads((tmp_path / name / "config.json").read_text())
        with torch.device("meta"):
            counted = sum(one.numel() for one in model_class(made).parameters())
        assert shape_of_config(told, name).params == counted, name


def test_a_position_of_latents() -> None:
    """One vector of 512 + 64 numbers a layer; a query multiplies it whole for a score, its first 512 for a value."""
    lite = shape_of_config(LITE, "lite")
    assert lite.kv_bytes == 27 * 576 * 2
    assert lite.pair_flops == 16 * (2 * 576 + 2 * 512)
    fewer = work_of(lite, features_of([(999, 1, True)]))
    more = work_of(lite, features_of([(1999, 1, True)]))
    assert more[0] - fewer[0] == pytest.approx(1000 * 27 * 576 * 2)
    assert more[1] - fewer[1] == pytest.approx(1000 * 27 * lite.pair_flops)
    with pytest.raises(BadConfig, match="mixture"):
        RooflineTimes(Roofline(lite, CARD))


def test_a_dense_layer_before_mixtures() -> None:
    """Means over layers add up to what the layers are."""
    lite = shape_of_config(LITE, "lite")
    dense, expert = 3 * 2048 * 10944, 3 * 2048 * 1408
    fixed = 26 * (64 * 2048 + 2 * expert) + dense + 27 * lite.attention_params
    assert lite.layers * lite.layer_params == pytest.approx(fixed + 26 * 6 * expert)
    assert lite.layers * read_params(lite, 10**6) == pytest.approx(fixed + 26 * 64 * expert)
    one, many = (Roofline(lite, CARD).seconds(features_of([(9, 1, True)] * n)) for n in (1, 64))
    assert one < many


def windowed(shape: ModelShape, contexts: list[int]) -> float:
    """Bytes of keys and values, layer by layer."""
    each = 2 * shape.kv_heads * shape.head_dim * shape.kv_item_bytes
    wide = shape.layers - shape.window_layers
    assert shape.window is not None
    seen = [
        wide * context + shape.window_layers * min(context, shape.window) for context in contexts
    ]
    return sum(seen) * each


def test_layers_with_windows_read_no_more_than_those() -> None:
    gemma = shape_of_config(GEMMA_3, "g")
    assert (gemma.window, gemma.window_layers) == (512, 22)
    for context in (100, 511, 512, 513, 4000):
        step = features_of([(context - 1, 1, True)] * 3)
        weights = work_of(gemma, step._replace(decode_context=0))[0]
        read = work_of(gemma, step)[0] - weights
        assert read == pytest.approx(windowed(gemma, [context] * 3))
    whole = features_of([(0, 4000, True)])
    pairs = 4 * (4000 * 4001 // 2) + 22 * (4000 * 512)
    products = work_of(gemma, whole._replace(prefill_pairs=0))[1]
    assert work_of(gemma, whole)[1] - products == pytest.approx(gemma.pair_flops * pairs)
    assert gemma.kv_bytes == 26 * 2 * 256 * 2, "memory holds all of them"


def test_a_run_that_reaches_the_window_equals_its_steps() -> None:
    """Bit for bit, on both sides of the bend and across it."""
    model = Roofline(shape_of_config(GEMMA_3, "g"), CARD)
    for start in (100, 470, 509, 511, 512, 600):
        first: StepFeatures = features_of(
            [(start, 1, True), (start + 5, 1, True), (start - 9, 1, True)]
        )
        run = model.run_seconds(first, 150)
        assert run == [model.seconds(first.grown(at)) for at in range(150)]
        assert all(a <= b for a, b in zip(run, run[1:], strict=False))
    far, near = (
        model.seconds(first.grown(50)) - model.seconds(first) for first in
        (features_of([(5000, 1, True)]), features_of([(100, 1, True)]))
    )  # fmt: skip
    assert far == pytest.approx(near * 4 / 26)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"model_type": "mistral"}, (4096, 4)),
        ({"model_type": "mistral", "sliding_window": None}, (None, 0)),
        ({"model_type": "qwen2", "sliding_window": 8}, (None, 0)),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, (8, 1)),
        ({"model_type": "gemma2"}, (4096, 2)),
        ({"model_type": "gemma2", "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, (4096, 3)),
        ({"model_type": "phi3", "sliding_window": 2047}, (2047, 4)),
    ],
)  # fmt: skip
def test_which_layers_have_windows(told: dict[str, object], expected: tuple[int, int]) -> None:
    shape = shape_of_config({**config("llama", (64, 4, 4, 4, 64, 128)), **told}, "x")
    assert (shape.window, shape.window_layers) == expected


def test_smallthinker() -> None:
    """Of the 21B model, as its report has it: a token passes 3 of 21 billion weights; windows in 39 of 52 layers."""
    layout = [int(layer % 4 > 0) for layer in range(52)]
    told = {
        "model_type": "smallthinker", "hidden_size": 2560, "num_hidden_layers": 52, "num_attention_heads": 28,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "moe_num_primary_experts": 64,
        "moe_num_active_primary_experts": 6, "moe_ffn_hidden_size": 768, "tie_word_embeddings": False,
        "sliding_window_layout": layout, "sliding_window_size": 4096, "max_position_embeddings": 16384,
    }  # fmt: skip
    shape = shape_of_config(told, "smallthinker")
    assert round(shape.params / 1e9) == 21 or round(shape.params / 1e9) == 22
    assert round(shape.flops_per_token / 2e9) == 3
    assert (shape.window, shape.window_layers) == (4096, 39)


@pytest.mark.parametrize("kind", ["deepseek_v3", "smollm3", "granite", "olmo2"])
def test_as_many_parameters_as_transformers_makes(kind: str) -> None:
    """With the defaults of each class; of DeepSeek-V3 that is the published model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    told = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(told)
    shape = shape_of_config(told.to_dict(), kind)
    assert shape.params == sum(value.numel() for value in model.parameters())
    if kind == "deepseek_v3":
        assert round(shape.params / 1e9) == 671
