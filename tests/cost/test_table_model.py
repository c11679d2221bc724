"""Steps priced from operator tables: by hand where the tables follow a law, and as their publisher measured them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import BadConfig
from penstock.cost.engines import Engine, engine_of
from penstock.cost.hardware import card_of
from penstock.cost.op_tables import read_op_tables
from penstock.cost.shapes import shape_of
from penstock.cost.step import StepFeatures, features_of
from penstock.cost.table import TableModel
from penstock.cost.warmup import ColdStart
from tests.cost.linear_tables import (
    ALPHA,
    DENSE,
    HEAD,
    decode_us,
    experts_us,
    mixed_us,
    write_experts,
    write_tables,
)

LLAMA, CARD = shape_of("llama-3.1-8b"), card_of("rtx-pro-6000")
LAYERS = LLAMA.layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tables(tmp_path_factory.mktemp("tables") / "linear")


@pytest.fixture(scope="module")
def model(folder: Path) -> TableModel:
    return TableModel(read_op_tables(folder), LLAMA, CARD)


def fixed_us(tokens: int, samples: int) -> float:
    """By hand: what does not depend on contexts."""
    once = ("embedding", "final_layernorm")
    total = 0.0
    for name, (call, each) in DENSE.items():
        times = 1 if name in once else 2 * LAYERS if name == "layernorm" else LAYERS
        total += times * (call + each * tokens)
    head = sum(call + each * samples for call, each in HEAD.values()) if samples else 0.0
    return total + head


def test_a_step_of_decodes_by_hand(model: TableModel) -> None:
    """Between measured numbers and contexts, with the longest pulling by the median alpha."""
    features = features_of([(299, 1, True)] * 15 + [(1999, 1, True)])
    mean = (15 * 300 + 2000) / 16
    attention = decode_us(16, mean) + ALPHA * (decode_us(16, 2000) - decode_us(16, mean))
    expected = fixed_us(16, 16) + LAYERS * attention
    assert model.seconds(features) == pytest.approx(expected * 1e-6, rel=1e-9)
    assert model.seconds(features, 0.5) == pytest.approx(2e-6 * expected, rel=1e-9)


def test_a_step_with_a_prefill_by_hand(model: TableModel) -> None:
    features = features_of([(599, 1, True)] * 4 + [(100, 300, False)])
    expected = fixed_us(304, 4) + LAYERS * mixed_us(300, 100, 4, 600)
    assert model.seconds(features) == pytest.approx(expected * 1e-6, rel=1e-9)
    alone = features_of([(0, 300, True)])
    expected = fixed_us(300, 1) + LAYERS * mixed_us(300, 0, 0, 0)
    assert model.seconds(alone) == pytest.approx(expected * 1e-6, rel=1e-9)


def test_several_fresh_prompts_cost_less_than_one_as_long(model: TableModel) -> None:
    """They have fewer pairs; never less than the smallest call."""
    one, four = features_of([(0, 1024, True)]), features_of([(0, 256, True)] * 4)
    head = HEAD["lm_head"][1] * 3 + HEAD["sampler"][1] * 3
    share = 4 * (256 * 257 / 2) / (1024 * 1025 / 2)
    saved = (mixed_us(1024, 0, 0, 0) - mixed_us(16, 0, 0, 0)) * (1 - share)
    expected = model.seconds(one) + 1e-6 * (head - LAYERS * saved)
    assert model.seconds(four) == pytest.approx(expected, rel=1e-9)


@settings(deadline=None)
@given(
    contexts=st.lists(st.integers(1, 20_000), min_size=1, max_size=200),
    count=st.integers(1, 400),
    share=st.sampled_from([1.0, 0.7]),
)
def test_a_run_costs_what_its_steps_cost_bit_for_bit(
    model: TableModel, contexts: list[int], count: int, share: float
) -> None:
    features = features_of([(context, 1, True) for context in contexts])
    assert model.run_seconds(features, count, share) == [
        model.seconds(features.grown(step), share) for step in range(count)
    ]


def test_layers_take_their_part(model: TableModel) -> None:
    whole = features_of([(999, 1, False)] * 8)
    half = features_of([(999, 1, False)] * 8, layers=LAYERS // 2)
    assert 2 * model.seconds(half) == pytest.approx(model.seconds(whole), rel=1e-9)


def test_all_reduces_are_those_of_the_card(folder: Path, model: TableModel) -> None:
    """Twice a layer, by the alpha-beta of its links; a size nobody measured is refused at once."""
    pair = TableModel(read_op_tables(folder), LLAMA, CARD, tp=2)
    step = features_of([(999, 1, True)] * 32)
    each = 20e-6 + 32 * 4096 * 2 / 16e9
    extra = pair.seconds(step) - model.seconds(step)
    assert extra == pytest.approx(2 * LAYERS * each, rel=1e-9)
    with pytest.raises(BadConfig, match="no all-reduce among 8"):
        TableModel(read_op_tables(folder), LLAMA, CARD, tp=8)


def test_an_engine_pads_and_adds(folder: Path, model: TableModel) -> None:
    vllm = engine_of("vllm 0.19")
    assert [vllm.padded(rows) for rows in (1, 3, 9, 257, 513)] == [1, 4, 16, 272, 513]
    engine = Engine(graph_sizes=((16, 64, 16),), step_s=1e-3, prefill_s=2e-3, job_s=1e-5)
    found = TableModel(read_op_tables(folder), LLAMA, CARD, engine=engine)
    nine, padded = (features_of([(999, 1, False)] * num) for num in (9, 16))
    plain = model.seconds(nine) + 1e-6 * (fixed_us(16, 0) - fixed_us(9, 0))
    assert found.seconds(nine) == pytest.approx(plain + 1e-3 + 9e-5, rel=1e-9)
    prefill = features_of([(0, 2048, False)])
    assert found.seconds(prefill) == pytest.approx(model.seconds(prefill) + 3.01e-3, rel=1e-9)
    assert found.digest != model.digest and padded.num_tokens == vllm.padded(9)
    with pytest.raises(BadConfig, match="engine_costs has no 'luck'"):
        engine.with_costs({"luck": 1.0})
    with pytest.raises(BadConfig, match="vllm 9"):
        engine_of("vllm 9")


def test_the_first_step_of_a_process_costs_more_once(model: TableModel) -> None:
    step = features_of([(999, 1, True)] * 8)
    cold = ColdStart(model, 0.5)
    assert cold.seconds(step) == model.seconds(step) + 0.5
    assert cold.seconds(step) == model.seconds(step)
    run, warm = ColdStart(model, 0.5).run_seconds(step, 3), model.run_seconds(step, 3)
    assert run == [warm[0] + 0.5, *warm[1:]]


def test_experts_by_hand(tmp_path: Path) -> None:
    """What as many experts cost as the tokens are expected to reach; padding rows reach some too."""
    qwen, h100 = shape_of("qwen3-30b-a3b"), card_of("h100")
    found = TableModel(read_op_tables(write_experts(tmp_path / "moe")), qwen, h100)
    step = features_of([(999, 1, False)] * 64)
    reached = 128 * (1 - (1 - 8 / 128) ** 64)
    dense = 0.0
    for name, (call, each) in DENSE.items():
        if name in ("gate_up_proj", "down_proj"):
            continue
        times = 1 if name in ("embedding", "final_layernorm") else 96 if name == "layernorm" else 48
        dense += times * (call + each * 64)
    expected = dense + 48 * (experts_us(64, reached) + decode_us(64, 1000))
    assert found.seconds(step) == pytest.approx(expected * 1e-6, rel=1e-9)
    with pytest.raises(BadConfig, match="a mixture of experts, but llama-3.1-8b is a dense model"):
        TableModel(found.tables, LLAMA, h100)


def test_a_step_tells_energy_and_work(model: TableModel) -> None:
    cost = model.step(features_of([(999, 1, True)] * 8 + [(0, 100, True)]))
    assert cost.time_s == pytest.approx(sum(part for _, part in cost.breakdown))
    assert cost.energy_j is not None and 0 < cost.energy_j <= CARD.tdp_w * cost.time_s
    assert cost.num_bytes is not None and cost.num_bytes > LLAMA.layers * LLAMA.layer_params * 2


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("dense.csv", "layer,tokens,time_us\nqkv_proj,one,3\n", "not a row of numbers"),
        ("dense.csv", "layer,time_us\nqkv_proj,3\n", "no column tokens"),
        ("dense.csv", "layer,tokens,time_us\nact_fn,1,3\n", "no rows of layernorm"),
        ("per_sequence.csv", "layer,sequences,time_us\n", "is empty"),
        ("attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,1,16,nan\n", "undefined"),
        ("attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,1,16,9\n", "of both together"),
        ("skew_fit.csv", "pc,alpha\n0,much\n", "not a row of numbers"),
    ],
)  # fmt: skip
def test_bad_tables_say_what_is_wrong(tmp_path: Path, name: str, text: str, match: str) -> None:
    folder = write_tables(tmp_path / "bad")
    (folder / name).write_text(text)
    with pytest.raises(BadConfig, match=match) as error:
        read_op_tables(folder)
    assert name in error.value.message


def test_missing_tables_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no folder of operator tables"):
        read_op_tables(tmp_path / "nowhere")
    folder = write_tables(tmp_path / "some")
    (folder / "attention.csv").unlink()
    with pytest.raises(BadConfig, match=r"attention\.csv, which is not there"):
        read_op_tables(folder)


@pytest.mark.parametrize(
    ("name", "shape", "card", "tp", "tokens_per_s"),
    [
        # Seconds of the published logs in which only decodes ran, 128 at a time or as many as memory held.
        ("RTXPRO6000_meta-llama_Llama-3.1-8B_bf16_tp1", "llama-3.1-8b", "rtx-pro-6000", 1, (128, 1060, 4750)),
        ("RTXPRO6000_Qwen_Qwen3-32B_bf16_tp2", "qwen3-32b", "rtx-pro-6000", 2, (128, 1010, 2230)),
        ("RTX4090_meta-llama_Llama-3.1-8B_bf16_tp1", "llama-3.1-8b", "rtx-4090", 1, (36, 1130, 1436)),
    ],
)  # fmt: skip
def test_published_tables_give_the_published_speed(
    penstock_data: Path,
    name: str,
    shape: str,
    card: str,
    tp: int,
    tokens_per_s: tuple[int, int, int],
) -> None:
    tables = read_op_tables(penstock_data / "op_tables" / name)
    found = TableModel(tables, shape_of(shape), card_of(card), tp=tp, engine=engine_of("vllm 0.19"))
    num, context, rate = tokens_per_s
    step = StepFeatures(num, num, num, num, num * context, 3 * context)
    assert num / found.seconds(step) == pytest.approx(rate, rel=0.06)


def test_a_digest_names_tables_and_card(folder: Path, model: TableModel) -> None:
    tables = read_op_tables(folder)
    assert TableModel(tables, LLAMA, card_of("h100")).digest != model.digest
    assert tables.digest in model.name and "linear" in model.name
