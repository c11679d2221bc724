"""Mixtures of experts: coverage against chance and real routing, shapes against transformers, times as published."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.core.errors import BadModel
from penstock.cost.coverage import EmpiricalCoverage, UniformCoverage, coverage_of_counts
from penstock.cost.hardware import card_of
from penstock.cost.roofline import Host, Roofline
from penstock.cost.shapes import ModelShape, shape_of, shape_of_config
from penstock.cost.step import StepFeatures, features_of
from penstock.cost.work import work_of

QWEN = shape_of("qwen3-30b-a3b")


def test_coverage_is_what_chance_gives() -> None:
    """Against drawing 8 of 128 experts for each token."""
    chance = np.random.default_rng(3)
    for tokens in (1, 4, 16, 64):
        drawn = [
            len(np.unique([chance.choice(128, 8, replace=False) for _ in range(tokens)]))
            for _ in range(60)
        ]
        assert UniformCoverage(128, 8).distinct(tokens) == pytest.approx(np.mean(drawn), rel=0.03)


def test_uneven_routing_reaches_fewer_experts() -> None:
    even = EmpiricalCoverage((8 / 128,) * 128)
    uneven = EmpiricalCoverage((0.5,) * 8 + (4 / 120,) * 120)
    assert even.distinct(20) == pytest.approx(UniformCoverage(128, 8).distinct(20))
    assert uneven.distinct(20) < even.distinct(20)
    assert uneven.distinct(1) == pytest.approx(8)
    with pytest.raises(ValueError, match="between 0 and 1"):
        EmpiricalCoverage((1.5,))


def test_real_tokens_reach_what_their_popularity_says(penstock_data: Path) -> None:
    """Published routing of a 16B mixture, 6 of 64: batches of 32 tokens of many sequences reach as many experts as
    independent draws by popularity would, and fewer than even ones."""
    path = penstock_data / "expert_traces" / "summary_layer14.txt.gz"
    lines = gzip.open(path, "rt").read().splitlines()[:-1]
    told = [line.split("\t\t")[0].split("\t") for line in lines[:200]]
    tokens = np.concatenate([np.array(each, dtype=int).reshape(-1, 6) for each in told])
    counts = np.bincount(tokens.ravel(), minlength=64)
    found = coverage_of_counts(counts.tolist(), len(tokens))
    chance = np.random.default_rng(1)
    real = np.mean(
        [len(np.unique(tokens[chance.integers(0, len(tokens), 32)])) for _ in range(400)]
    )
    assert found.distinct(32) == pytest.approx(real, rel=0.03)
    assert found.distinct(32) < UniformCoverage(64, 6).distinct(32)


def test_times_of_one_layers_experts_are_those_published() -> None:
    """AIConfigurator's tables of vLLM on an H100: 128 experts of 768, 8 a token, hidden 2,048. Reading weights decides:
    flat from 64 to 512 tokens, though the work grows eightfold. A single token is bound by what no roofline sees."""
    model = Roofline(QWEN, card_of("h100"), host=Host(launch_s=0.0, per_job_s=0.0))
    dense = Roofline(
        ModelShape(
            name="the same without experts", hidden=2048, layers=48, heads=32, kv_heads=4, head_dim=128,
            ffn=1, vocab=151936, max_context=4096,
        ),
        card_of("h100"), host=Host(launch_s=0.0, per_job_s=0.0),
    )  # fmt: skip

    def layer_s(rows: int) -> float:
        step = features_of([(0, rows, False)])
        parts, others = (dict(one.step(step).breakdown) for one in (model, dense))
        return (parts["layers"] - others["layers"]) / 48

    for tokens, published_ms in ((64, 0.42), (256, 0.45), (512, 0.48)):
        assert layer_s(tokens) == pytest.approx(published_ms * 1e-3, rel=0.15), tokens
    assert layer_s(16) < layer_s(64) < 1.1 * layer_s(512) < layer_s(16384)


def test_a_step_reads_the_experts_it_reaches() -> None:
    one, many = (work_of(QWEN, StepFeatures(num, num, 0)) for num in (1, 4096))
    active = QWEN.layers * QWEN.layer_params * 2
    whole = QWEN.layers * QWEN.stored_layer_params * 2
    assert one[0] == pytest.approx(active + QWEN.kv_bytes)
    assert many[0] == pytest.approx(whole + 4096 * QWEN.kv_bytes)
    assert many[1] / 4096 == one[1] == 2 * QWEN.layers * QWEN.layer_params


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_parameters_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {
        "Mixtral": {"num_local_experts": 4, "intermediate_size": 96},
        "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 96},
    }
    config = getattr(transformers, f"{family}Config")(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        **sizes[family],
    )
    config.save_pretrained(tmp_path)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    found = shape_of(str(tmp_path))
    assert found.params == sum(one.numel() for one in model.parameters())
    assert (found.experts, found.top_k) == (4, 2)


def test_mixtures_that_do_not_add_up() -> None:
    with pytest.raises(BadModel, match="mlp_only_layers must be a list"):
        shape_of_config(
            {"model_type": "qwen3_moe", "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 2,
             "intermediate_size": 8, "moe_intermediate_size": 8, "num_experts": 4, "mlp_only_layers": 3}, "x",
        )  # fmt: skip
    with pytest.raises(ValueError, match="needs experts, top_k and expert_ffn"):
        ModelShape(name="x", hidden=1, layers=1, heads=1, kv_heads=1, head_dim=1, ffn=1, vocab=1,
                   max_context=1, experts=4)  # fmt: skip
