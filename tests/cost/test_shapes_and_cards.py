"""Shapes against published parameter counts and transformers; the card catalogue against hand-computed values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import BadConfig, BadModel, SchemaMismatch
from penstock.cost.hardware import (
    CATALOGUE,
    RESERVE_BYTES,
    card_of,
    curve,
    num_blocks,
    read_catalogue,
)
from penstock.cost.shapes import PRESETS, shape_of, shape_of_config

PUBLISHED = {  # parameters that the publishers' safetensors indices add up to
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert shape_of(name).params == PUBLISHED[name]


def test_kv_bytes_of_a_token() -> None:
    assert shape_of("llama-3.1-8b").kv_bytes == 131_072
    assert shape_of("llama-2-7b").kv_bytes == 524_288
    assert shape_of("llama-3.1-70b").kv_bytes == 327_680


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_parameters_equal_those_of_transformers(
    transformers: Any, family: str, is_tied: bool, tmp_path: Path
) -> None:
    config = getattr(transformers, f"{family}Config")(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        tie_word_embeddings=is_tied,
    )
    config.save_pretrained(tmp_path)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    assert shape_of(str(tmp_path)).params == sum(one.numel() for one in model.parameters())


def test_a_folder_is_read_like_its_preset(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, preset = shape_of(str(tmp_path)), PRESETS["llama-3.1-8b"]
    assert (found.params, found.kv_bytes, found.head_dim) == (preset.params, preset.kv_bytes, 128)
    halved = shape_of_config({**config, "torch_dtype": "float32"}, "x")
    assert halved.weight_bytes == 2 * preset.weight_bytes


def test_bad_models_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="known as 'nope'") as error:
        shape_of("nope")
    assert "llama-3.1-8b" in error.value.hint
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadModel, match="not valid JSON"):
        shape_of(str(tmp_path))
    with pytest.raises(BadModel, match="experts"):
        shape_of_config({"model_type": "qwen3", "num_experts": 8}, "x")
    with pytest.raises(BadModel, match="hidden_size = None"):
        shape_of_config({"model_type": "llama"}, "x")
    with pytest.raises(BadModel, match="'mamba'"):
        shape_of_config({"model_type": "mamba"}, "x")


def test_every_card_is_plausible() -> None:
    cards = read_catalogue()
    assert {"a100-80g", "h100", "h200", "b200", "l4", "a10g", "l40s", "mi300x"} <= set(cards)
    for card in cards.values():
        assert 0.5 < card.gemm_mbu <= 1 and 0.5 < card.decode_attention_mbu <= 1, card.name
        for points in (card.gemm_mfu, card.prefill_attention_mfu):
            assert all(0 < share <= 1 for _, share in points), card.name
            assert sorted(points) == list(points), card.name
        assert card.watts(0, 0) < card.watts(0.5, 0.5) <= card.watts(1, 1) == card.tdp_w
        assert card.as_of >= "2024" and card.source


def test_all_reduce_by_hand() -> None:
    card = card_of("a100-80g")
    assert card.all_reduce_s(1e6, 1) == 0.0
    assert card.all_reduce_s(1e6, 4) == pytest.approx(15e-6 + 1.5 * 1e6 / 217e9)
    with pytest.raises(BadConfig, match="among 3 a100-80g"):
        card.all_reduce_s(1e6, 3)


def test_curves_interpolate_and_hold_their_ends() -> None:
    points = ((10.0, 1.0), (20.0, 3.0))
    assert [curve(points, at) for at in (0, 10, 15, 20, 99)] == [1.0, 1.0, 2.0, 3.0, 3.0]


def test_blocks_that_fit_by_hand() -> None:
    card, shape = card_of("a100-80g"), shape_of("llama-3.1-8b")
    free = 81920 * 2**20 * 0.9 - RESERVE_BYTES - 8_030_261_248 * 2
    assert num_blocks(card, shape) == int(free // (131072 * 16))
    two = num_blocks(card, shape_of("llama-3.1-70b"), tp=4)
    assert two == int(
        (4 * (81920 * 2**20 * 0.9 - RESERVE_BYTES) - 141_107_412_992) // (327680 * 16)
    )
    with pytest.raises(BadConfig, match="no room"):
        num_blocks(card, shape_of("llama-3.1-70b"))


def test_a_file_of_ones_own_adds_and_replaces_cards(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="known: a100-80g"):
        card_of("abacus")
    text = (
        CATALOGUE.read_text().replace('"l4"', '"abacus"').replace("tflops = 312.0", "tflops = 1.0")
    )
    mine = tmp_path / "mine.toml"
    mine.write_text(text)
    assert card_of("abacus", mine).tflops == 121.0
    assert card_of("a100-80g", mine).tflops == 1.0 and card_of("a100-80g").tflops == 312.0
    mine.write_text(text.replace("tdp_w", "tdp"))
    read_catalogue.cache_clear()
    with pytest.raises(BadConfig, match=r"card\[0\].tdp'.*did you mean 'tdp_w'"):
        card_of("abacus", mine)
    mine.write_text(text.replace("schema = 1", "schema = 2"))
    with pytest.raises(SchemaMismatch):
        card_of("abacus", mine)
