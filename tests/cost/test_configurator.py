"""AIConfigurator's tables as ours: packages of both layouts and a linear law, priced by hand; then the real one."""

from __future__ import annotations

import dataclasses
import functools
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.predictors import step_model
from penstock.cluster.spec import ExecutorSpec
from penstock.core.errors import BadConfig, MissingExtra
from penstock.cost import table_files
from penstock.cost.attention_table import SplitAttention
from penstock.cost.configurator import read_configurator
from penstock.cost.grid import Point
from penstock.cost.hardware import card_of
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import shape_of
from penstock.cost.step import features_of
from penstock.cost.table import TableModel
from tests.cost.packages import (
    Package,
    decode_ms,
    experts_ms,
    gemm_ms,
    prefill_ms,
    sum_ms,
    write_dense,
    write_experts,
    write_sums,
)

LLAMA, QWEN, H100 = shape_of("llama-3.1-8b"), shape_of("qwen3-30b-a3b"), card_of("h100")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packages are looked for, and nowhere else."""
    finder = functools.partial(PathFinder.find_spec, path=[str(tmp_path)])
    monkeypatch.setattr(table_files, "find_spec", finder)
    return tmp_path


@pytest.fixture(params=["aiconfigurator_core", "aiconfigurator"])
def package(request: pytest.FixtureRequest, place: Path) -> Package:
    found = Package(place, request.param)
    write_dense(found, "0.19.0")
    return found


def layer_ms(tokens: int, item: float = 1.0) -> float:
    """A layer's products and small kernels, by hand; lines bend at the measured m, and this law is straight."""
    hidden, ffn = 4096, 14336
    sizes = ((6144, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn))
    products = sum(gemm_ms(tokens, n, k) for n, k in sizes)
    moved = tokens * (8 * hidden + 3 * ffn) * 2 / (3.35e12 * 0.8)
    return item * products + 1e3 * (4 * 3e-6 + moved)


def test_steps_by_hand(package: Package) -> None:
    spec = ExecutorSpec(kind="modelled", gpu="h100", tables="aiconfigurator")
    model = step_model(spec, LLAMA)
    assert f"{package.name} 9.8.7 h100_sxm vllm 0.19.0 [" in model.name
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


def test_numbers_of_one_byte_have_their_own_rows(package: Package) -> None:
    shape = dataclasses.replace(LLAMA, weight_item_bytes=1.0, kv_item_bytes=1.0)
    model = TableModel(read_configurator(shape, H100), shape, H100)
    expected = 32 * (layer_ms(32, 0.5) + 0.5 * decode_ms(32, 1000)) + gemm_ms(32, 128256, 4096)
    decodes = features_of([(999, 1, True)] * 32)
    assert model.seconds(decodes) == pytest.approx(expected * 1e-3, rel=1e-9)
    with pytest.raises(BadConfig, match="1 or 2 bytes a number, not 4"):
        read_configurator(dataclasses.replace(LLAMA, weight_item_bytes=4.0), H100)


def test_a_mixture_has_its_own_experts(package: Package) -> None:
    write_dense(package, "0.19.0", heads=(32, 4))
    write_experts(package, "0.18.0")
    tables = read_configurator(QWEN, H100)
    assert tables.is_mixture
    assert tables.layer["experts"](32) == pytest.approx(experts_ms(32) * 1e-3)
    assert tables.name.endswith("vllm 0.19.0 (moe_perf of vllm 0.18.0)")
    with pytest.raises(BadConfig, match="not measured the experts of qwen3-30b-a3b at 4 cards"):
        write_dense(package, "0.20.0", heads=(8, 1))
        read_configurator(QWEN, H100, tp=4)


def test_sums_among_cards_are_the_engines_then_nccls_then_the_catalogues(package: Package) -> None:
    write_sums(package, "0.14.0")
    numbers = 64 * 4096
    write_dense(package, "0.19.0", heads=(16, 4))
    two = read_configurator(LLAMA, H100, tp=2)
    assert two.sums is not None and "custom_allreduce_perf of vllm 0.14.0" in two.name
    assert two.sums(2 * numbers) == pytest.approx(sum_ms(numbers) * 1e-3)
    write_dense(package, "0.20.0", heads=(8, 2))
    four = read_configurator(LLAMA, H100, tp=4)
    assert four.sums is not None and "nccl_perf of nccl 2.29.2" in four.name
    assert four.sums(2 * numbers) == pytest.approx(2 * sum_ms(numbers) * 1e-3)
    write_dense(package, "0.21.0", heads=(4, 1))
    eight = read_configurator(LLAMA, H100, tp=8)
    assert eight.sums is None
    assert read_configurator(LLAMA, H100, tp=2, engine="vllm 0.19").digest == two.digest
    step = features_of([(999, 1, False)] * 64)
    found = TableModel(two, LLAMA, H100, tp=2).seconds(step)
    without = TableModel(dataclasses.replace(two, sums=None), LLAMA, H100, tp=2).seconds(step)
    card_s = H100.all_reduce_s(2 * numbers, 2)
    assert found - without == pytest.approx(64 * (sum_ms(numbers) * 1e-3 - card_s), rel=1e-6)


def test_the_newest_that_fits_and_the_newer_package_first(place: Path) -> None:
    for module, versions in (
        ("aiconfigurator", ("0.9.0", "0.19.0")),
        ("aiconfigurator_core", ("0.22.1", "0.24.0")),
    ):
        for version in versions:
            write_dense(Package(place, module), version)
    for engine, expected in (
        (None, "aiconfigurator-core 9.8.7 h100_sxm vllm 0.24.0"),
        ("vllm 0.22", "aiconfigurator-core 9.8.7 h100_sxm vllm 0.22.1"),
        ("vllm 0.19", "aiconfigurator 9.8.7 h100_sxm vllm 0.19.0"),
        ("vllm 0.9", "aiconfigurator 9.8.7 h100_sxm vllm 0.9.0"),
    ):
        assert read_configurator(LLAMA, H100, engine=engine).name == expected
    there = "core 9.8.7 has: vllm 0.22.1, vllm 0.24.0; aiconfigurator 9.8.7 has: vllm 0.9.0, vllm 0.19.0"
    with pytest.raises(
        BadConfig, match=f"no tables of vllm 0.2 on h100; aiconfigurator-{there}"
    ) as error:
        read_configurator(LLAMA, H100, engine="vllm 0.2")
    assert error.value.hint == ""


def test_contents_decide_the_digest(package: Package) -> None:
    first = read_configurator(LLAMA, H100)
    assert read_configurator(LLAMA, H100).digest == first.digest
    path = next(package.system.rglob("context_attention_perf.parquet"))
    path.write_bytes(path.read_bytes() + b" ")
    table_files.digest_of.cache_clear()
    assert read_configurator(LLAMA, H100).digest != first.digest


def test_a_chunk_with_a_prefix_costs_its_share_of_the_pairs(package: Package) -> None:
    attention = read_configurator(LLAMA, H100).attention
    pairs = 512 * 3584 + 512 * 513 // 2
    share = pairs / (4096 * 4097 / 2)
    found = attention.mixed(512, pairs, 0, 0.0)
    assert found == pytest.approx(share * prefill_ms(1, 4096) * 1e-3, rel=1e-3)


def test_decodes_beside_a_prefill_fill_tiles_of_their_own() -> None:
    """Prompts that cost 1 us for each pair of their tiles: 64 queries of a decode at 1,024 see 1,088 keys each."""
    lengths = (64, 128, 256, 512, 1024, 2048)
    prefills: dict[Point, float] = {
        (num, c): 1e-6 * num * c * (c + 128) / 2 for num in (1, 8) for c in lengths
    }
    decodes = {num: {1: 1e-3, 2048: 2e-3} for num in (1, 8)}
    plain, tiled = (SplitAttention(decodes, prefills, is_tiled=each) for each in (False, True))
    alone = plain.mixed(512, 512 * 513 // 2, 0, 0.0)
    assert tiled.mixed(512, 512 * 513 // 2, 0, 0.0) == alone
    found = tiled.mixed(512, 512 * 513 // 2, 8, 1024.0) - alone
    assert found == pytest.approx(8 * 64 * 1088e-6)
    assert tiled.mixed(512, 512 * 513 // 2, 1, 1.0) - alone == pytest.approx(64 * 65e-6)
    fast = SplitAttention(decodes, {at: 1e-9 for at in prefills}, is_tiled=True)
    assert fast.mixed(1, 1, 8, 2048.0) == pytest.approx(2e-3, rel=1e-3)
    assert tiled.decodes(8)(1024) == plain.decodes(8)(1024)


def test_tiles_count_where_flash_attention_2_runs(place: Path) -> None:
    def mixed_s(card: str) -> float:
        return read_configurator(LLAMA, card_of(card)).attention.mixed(1, 1, 32, 64.0)

    for system in ("h100_sxm", "a100_sxm"):
        write_dense(Package(place, "aiconfigurator_core", system), "0.24.0")
    assert mixed_s("h100") == pytest.approx((decode_ms(32, 64) + prefill_ms(1, 1)) * 1e-3, rel=0.01)
    share = 64 * 128 / (64 * 192 / 2)
    assert share * prefill_ms(32, 64) > decode_ms(32, 64)
    assert mixed_s("a100-80g") == pytest.approx(
        (share * prefill_ms(32, 64) + prefill_ms(1, 1)) * 1e-3, rel=0.01
    )


def test_what_was_not_measured_is_refused(package: Package) -> None:
    with pytest.raises(
        BadConfig, match=r"no tables of vllm 0.11 on h100; .* 9.8.7 has: vllm 0.19.0"
    ) as error:
        read_configurator(LLAMA, H100, engine="vllm 0.11")
    other = "penstock[tables]" if package.name == "aiconfigurator" else "--no-deps aiconfigurator=="
    assert other in error.value.hint
    with pytest.raises(BadConfig, match="no tables of l4"):
        read_configurator(LLAMA, card_of("l4"))
    with pytest.raises(BadConfig, match="not measured attention of qwen2.5-14b"):
        read_configurator(shape_of("qwen2.5-14b"), H100)
    with pytest.raises(BadConfig, match="has no moe_perf"):
        read_configurator(QWEN, H100)


def test_without_a_package(place: Path) -> None:
    with pytest.raises(MissingExtra, match="aiconfigurator_core") as error:
        read_configurator(LLAMA, H100)
    assert "penstock[tables]" in error.value.hint
    (place / "aiconfigurator_core").mkdir()  # as the older package brings it: code alone
    (place / "aiconfigurator_core" / "__init__.py").touch()
    with pytest.raises(MissingExtra, match="aiconfigurator_core"):
        read_configurator(LLAMA, H100)


@pytest.mark.skipif(
    find_spec("aiconfigurator_core") is None, reason="needs the package aiconfigurator-core"
)
@pytest.mark.parametrize(
    ("model", "card", "tp"),
    [
        ("llama-3.1-8b", "rtx-pro-6000", 1),
        ("llama-3.1-8b", "a100-80g", 1),
        ("llama-3.1-70b", "h100", 4),
        ("llama-3.1-70b", "h200", 8),
        ("qwen3-30b-a3b", "h100", 1),
    ],
)
def test_the_real_tables_and_the_roofline_agree(model: str, card: str, tp: int) -> None:
    """Within 30 % for steps of decodes; prefills of a mixture are where the roofline is known to be too fast."""
    shape, found = shape_of(model), card_of(card)
    tables = TableModel(read_configurator(shape, found, tp=tp), shape, found, tp=tp)
    roofline = Roofline(shape, found, tp=tp)
    steps = [
        features_of([(context, 1, True)] * num)
        for num, context in ((16, 999), (64, 999), (128, 1999))
    ]
    steps.append(features_of([(0, 512, True)]))
    for step in steps:
        assert tables.seconds(step) == pytest.approx(roofline.seconds(step), rel=0.3)


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
