"""AIConfigurator's tables as ours: a package of the same layout and a linear law, priced by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.predictors import step_model
from penstock.cluster.spec import ExecutorSpec
from penstock.core.errors import BadConfig, MissingExtra
from penstock.cost import configurator
from penstock.cost.configurator import read_configurator
from penstock.cost.hardware import card_of
from penstock.cost.shapes import shape_of
from penstock.cost.step import features_of

LLAMA, H100 = shape_of("llama-3.1-8b"), card_of("h100")
SIZES = (1024, 4096, 8192, 16384)


def gemm_ms(m: int, n: int, k: int) -> float:
    return 0.004 + 1e-9 * n * k + 1e-11 * m * n * k


def decode_ms(batch: int, context: int) -> float:
    return 0.01 + 1e-6 * batch * context


def prefill_ms(batch: int, length: int) -> float:
    return 0.02 + 1e-5 * batch * length


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    pyarrow: Any = pytest.importorskip("pyarrow")
    root = tmp_path / "aiconfigurator"
    folder = root / "systems" / "data" / "h100_sxm" / "vllm" / "0.19.0"
    folder.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('data only, never imported')\n")

    def write(name: str, rows: list[dict[str, object]]) -> None:
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")

    head = {"num_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "beam_width": 1}
    write("gemm_perf", [
        {"gemm_dtype": kind, "m": m, "n": n, "k": k, "latency": gemm_ms(m, n, k) * (1 if kind == "bfloat16" else 9)}
        for kind in ("bfloat16", "fp8") for m in (1, 128, 2048) for n in SIZES for k in SIZES
    ])  # fmt: skip
    for kind in ("bfloat16", "fp8"):
        rows = [
            {**head, "kv_cache_dtype": kind, "batch_size": batch, "step": step,
             "latency": decode_ms(batch, step + 1)}
            for batch in (1, 16, 64) for step in (0, 127, 8191)
        ]  # fmt: skip
        write("generation_attention_perf", rows)
        rows = [
            {**head, "kv_cache_dtype": kind, "batch_size": batch, "isl": length,
             "latency": prefill_ms(batch, length)}
            for batch in (1, 4, 16) for length in (16, 512, 4096)
        ]  # fmt: skip
        write("context_attention_perf", rows)
        if kind == "bfloat16":
            break
    monkeypatch.syspath_prepend(str(tmp_path))
    configurator._rows.cache_clear()
    configurator._gemms.cache_clear()
    return folder


def layer_ms(tokens: int) -> float:
    """A layer's products and small kernels, by hand; lines bend at the measured m, and this law is straight."""
    hidden, ffn = 4096, 14336
    sizes = ((6144, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn))
    products = sum(gemm_ms(tokens, n, k) for n, k in sizes)
    moved = tokens * (8 * hidden + 3 * ffn) * 2 / (3.35e12 * 0.8)
    return products + 1e3 * (4 * 3e-6 + moved)


def test_steps_by_hand(package: Path) -> None:
    spec = ExecutorSpec(kind="modelled", gpu="h100", tables="aiconfigurator")
    model = step_model(spec, LLAMA)
    assert "aiconfigurator h100_sxm vllm 0.19.0" in model.name
    decodes = features_of([(999, 1, True)] * 32)
    expected = 32 * (layer_ms(32) + decode_ms(32, 1000)) + gemm_ms(32, 128256, 4096)
    assert model.seconds(decodes) == pytest.approx(expected * 1e-3, rel=1e-9)
    prefill = features_of([(0, 1024, False)])
    expected = 32 * (layer_ms(1024) + prefill_ms(1, 1024))
    assert model.seconds(prefill) == pytest.approx(expected * 1e-3, rel=1e-3)
    both = features_of([(999, 1, True)] * 32 + [(0, 512, False), (0, 512, False)])
    expected = 32 * (layer_ms(1056) + decode_ms(32, 1000) + prefill_ms(2, 512))
    expected += gemm_ms(32, 128256, 4096)
    assert model.seconds(both) == pytest.approx(expected * 1e-3, rel=1e-3)


def test_a_chunk_with_a_prefix_costs_its_share_of_the_pairs(package: Path) -> None:
    attention = read_configurator(LLAMA, H100).attention
    pairs = 512 * 3584 + 512 * 513 // 2
    share = pairs / (4096 * 4097 / 2)
    found = attention.mixed(512, pairs, 0, 0.0)
    assert found == pytest.approx(share * prefill_ms(1, 4096) * 1e-3, rel=1e-3)


def test_what_was_not_measured_is_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadConfig, match=r"no vllm 0.11 tables of h100; it has: vllm 0.19.0"):
        read_configurator(LLAMA, H100, engine="vllm 0.11")
    with pytest.raises(BadConfig, match="no tables of l4"):
        read_configurator(LLAMA, card_of("l4"))
    with pytest.raises(BadConfig, match="not measured attention of qwen2.5-14b"):
        read_configurator(shape_of("qwen2.5-14b"), H100)
    with pytest.raises(BadConfig, match="moe_perf is missing|no moe_perf"):
        read_configurator(shape_of("qwen3-30b-a3b"), H100)
    monkeypatch.setattr(configurator, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="aiconfigurator") as error:
        read_configurator(LLAMA, H100)
    assert "--no-deps aiconfigurator" in error.value.hint


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"tables": "aiconfigurator"}, "need `gpu`"),
        ({"gpu": "h100", "tables": "aiconfigurator", "clock": 0.5}, "leave `clock` out"),
    ],
)
def test_tables_need_a_card_at_full_clock(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(BadConfig, match=match):
        step_model(ExecutorSpec(kind="modelled", **wrong), LLAMA)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"op_tables": Path("x"), "tables": "aiconfigurator"}, "give one"),
        ({"engine": "vllm 0.19"}, "give op_tables or tables"),
        ({"engine_costs": {"step_s": 1.0}}, "name it with engine"),
        ({"clock": 1.5}, "a share above 0"),
    ],
)
def test_specs_that_contradict_themselves_are_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ExecutorSpec(kind="modelled", gpu="h100", **wrong)
