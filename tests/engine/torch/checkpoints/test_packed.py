"""Quantised safetensors compute what the float model of their dequantised weights computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.core.errors import BadModel
from penstock.engine.folder import model_facts
from penstock.engine.torch.checkpoints.join import joined
from penstock.engine.torch.checkpoints.open import open_stored
from penstock.engine.torch.ports import ShardSpec
from penstock.engine.torch.quantised import Quantised, quantise
from penstock.engine.torch.weights import WeightFolder
from tests.engine.torch.checkpoints.folders import (
    CPU,
    Kept,
    decoder_of,
    logits,
    packed_folder,
    reference,
)
from tests.engine.torch.checkpoints.packers import Packer, awq, compressed, fp8, gptq, integers

CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 48]}
GPTQ = {"quant_method": "gptq", "bits": 4}
# name, model, what packs a module, quantization_config, the forms that layers are given in
CASES: list[tuple[str, str, Packer, dict[str, object], set[tuple[int, int, bool, bool]]]] = [
    ("gptq", "llama2", gptq(), GPTQ, {(4, 32, True, False)}),
    ("gptq-symmetric", "qwen2", gptq(is_symmetric=True), GPTQ, {(4, 32, False, False)}),
    (
        "gptq-order",
        "qwen3",
        gptq(act_order=True),
        {**GPTQ, "desc_act": True},
        {(4, 32, True, True)},
    ),
    (
        "gptq-8-second",
        "qwen3",
        gptq(8, second=True),
        {**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"},
        {(8, 32, True, False)},
    ),
    ("awq", "qwen2", awq(), {"quant_method": "awq", "version": "gemm"}, {(4, 32, True, False)}),
    ("awq-experts", "mixtral", awq(), {"quant_method": "awq"}, {(4, 32, True, False)}),
    ("packed", "llama3", compressed(), CT, {(4, 32, False, False)}),
    ("packed-zeros", "qwen3", compressed(is_symmetric=False), CT, {(4, 32, True, False)}),
    ("packed-8", "llama2", compressed(8, None), CT, {(8, 64, False, False), (8, 96, False, False)}),
    (
        "integers",
        "llama2",
        integers,
        {**CT, "format": "int-quantized"},
        {(8, 64, False, False), (8, 96, False, False)},
    ),
    ("fp8-blocks", "deepseek-v2", fp8("block"), FP8, set()),
    ("fp8-rows", "llama2", fp8("row"), {"quant_method": "fbgemm_fp8"}, set()),
    ("fp8-whole", "qwen3-moe", fp8("whole"), {**CT, "format": "float-quantized"}, set()),
]


def everywhere(packer: Packer) -> Callable[[str], Packer | None]:
    """But the head and what routes."""
    return lambda name: None if name.endswith(("lm_head", ".gate")) else packer


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_as_the_dequantised_model(model_root: Path, tmp_path: Path, case) -> None:  # type: ignore[no-untyped-def]
    _, name, packer, told, forms = case
    place, model = packed_folder(model_root, name, tmp_path / "packed", everywhere(packer), told)
    want, method = reference(model), Kept()
    kept, said = decoder_of(place, method)
    assert (logits(kept) - want).abs().max() < 1e-3
    assert set(method.forms) == forms
    widened, _ = decoder_of(place)  # no method that keeps them
    assert (logits(widened) - want).abs().max() < 1e-3
    assert said is not None and ("FP8, dequantised" in said or "bits" in said)


def test_modules_that_were_left_out(model_root: Path, tmp_path: Path) -> None:
    """A float beside weights in few bits that read the same input, and two widths side by side."""

    def pack(name: str) -> Packer | None:
        if name.endswith(("v_proj", "lm_head")):
            return None
        return compressed(8, None) if name.endswith("gate_proj") else compressed(4)

    place, model = packed_folder(model_root, "llama2", tmp_path / "packed", pack, CT)
    method = Kept()
    decoder, _ = decoder_of(place, method)
    assert (logits(decoder) - reference(model)).abs().max() < 1e-3
    # of 3 layers: query, key (the value is numbers), output, down; gate (8 bits, one scale) with up (4, two groups)
    narrow, wide = (4, 32, False, False), (8, 32, False, False)
    assert sorted(method.forms) == [*[narrow] * 12, *[wide] * 3]


SHARED = [gptq(), awq(), compressed(is_symmetric=False), integers]


@pytest.mark.parametrize("packer", SHARED, ids="gptq awq ct int".split())
def test_shares_of_ranks_make_the_whole(model_root: Path, tmp_path: Path, packer: Packer) -> None:
    told = {"quant_method": "gptq"} if packer.__qualname__.startswith("gptq") else CT
    if packer.__qualname__.startswith("awq"):
        told = {"quant_method": "awq"}
    place, model = packed_folder(model_root, "llama2", tmp_path / "p", everywhere(packer), told)
    folder = WeightFolder(place, torch.float32, CPU)
    name = "model.layers.1.self_attn.o_proj.weight"
    whole = model.get_parameter(name)
    for dim, axis in (("out", 0), ("in", 1)):
        parts = [folder.get(name, (64, 64), ShardSpec(dim, rank, 2)) for rank in range(2)]  # type: ignore[arg-type]
        assert torch.allclose(torch.cat(parts, axis), whole)
    some = folder.weight(name, (64, 64), None, range(8, 19))
    assert isinstance(some, Quantised) and torch.allclose(some.expand(), whole[8:19])


def test_shares_that_cut_groups_are_refused(model_root: Path, tmp_path: Path) -> None:
    place, _ = packed_folder(model_root, "llama2", tmp_path / "p", everywhere(gptq()), GPTQ)
    folder = WeightFolder(place, torch.float32, CPU)
    name = "model.layers.0.mlp.down_proj.weight"  # 96 inputs in groups of 32
    with pytest.raises(BadModel, match="cut through groups of 32"):
        folder.get(name, (64, 96), ShardSpec("in", 0, 2))
    ordered = everywhere(gptq(act_order=True))
    place, _ = packed_folder(model_root, "llama2", tmp_path / "o", ordered, GPTQ)
    with pytest.raises(BadModel, match="desc_act"):
        WeightFolder(place, torch.float32, CPU).get(name, (64, 96), ShardSpec("in", 0, 3))


def test_one_form_holds_what_several_were() -> None:
    torch.manual_seed(0)
    fine, coarse = quantise(torch.randn(5, 128), 8, 32), quantise(torch.randn(3, 128), 4, 128)
    coarse = replace(coarse, zeros=torch.randint(0, 16, (3, 1), dtype=torch.uint8))
    (both,) = joined([fine, coarse])
    assert isinstance(both, Quantised) and (both.bits, both.group) == (8, 32)
    assert torch.equal(both.expand(), torch.cat((fine.expand(), coarse.expand())))
    order = torch.randperm(128)
    shuffled = [replace(part, order=order) for part in (fine, coarse)]
    (both,) = joined(shuffled)
    assert torch.equal(both.expand(), torch.cat([part.expand() for part in shuffled]))  # type: ignore[union-attr]
    assert len(joined([fine, replace(coarse, order=order)])) == 2


def edit(place: Path, module: str, **changes: torch.Tensor | None) -> None:
    tensors = load_file(place / "model.safetensors")
    for piece, value in changes.items():
        tensors.pop(f"{module}.{piece}", None)
        if value is not None:
            tensors[f"{module}.{piece}"] = value
    save_file(tensors, place / "model.safetensors")


MODULE = "model.layers.1.mlp.up_proj"


def only(packer: Packer) -> Callable[[str], Packer | None]:
    return lambda name: packer if name == MODULE else None


ODD = torch.ones(3, 96).half()
BROKEN = [
    ("no-scales", gptq(), GPTQ, {"scales": None}, "up_proj.scales"),
    ("no-zeros", gptq(), GPTQ, {"qzeros": None}, "up_proj.qzeros"),
    ("odd-groups", gptq(), GPTQ, {"scales": ODD}, "3 groups do not divide 64 inputs"),
    ("no-fp8-scale", fp8("row"), {"quant_method": "fp8"}, {"weight_scale": None}, "no scale"),
    ("no-blocks", fp8("block"), {"quant_method": "fp8"}, {}, "states no size of blocks"),
    ("other-blocks", fp8("block"), {**FP8, "weight_block_size": [16, 16]}, {}, "need another"),
    ("no-int-scale", integers, CT, {"weight_scale": None}, "up_proj.weight_scale"),
    ("no-packed-scale", compressed(), CT, {"weight_scale": None}, "up_proj.weight_scale"),
    ("awq-shape", awq(), {"quant_method": "awq"}, {"scales": torch.ones(2, 90).half()}, "but 90 scales"),
]  # fmt: skip


@pytest.mark.parametrize("case", BROKEN, ids=[case[0] for case in BROKEN])
def test_broken(model_root: Path, tmp_path: Path, case) -> None:  # type: ignore[no-untyped-def]
    _, packer, told, changes, text = case
    place, _ = packed_folder(model_root, "llama2", tmp_path / "p", only(packer), told)
    edit(place, MODULE, **changes)
    with pytest.raises(BadModel) as caught:
        decoder_of(place)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 3}, "bits 3"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv'"),
        ({**CT, "format": "marlin-24"}, "marlin-24"),
        ({**CT, "config_groups": {"group_0": {"format": "nvfp4-pack-quantized"}}}, "nvfp4"),
        ({**CT, "transform_config": {"config_groups": {}}}, "transform_config"),
        ({**FP8, "weight_block_size": [128]}, "no size of blocks"),
    ],
)
def test_what_cannot_be_read_is_said_before_loading(
    model_root: Path, tmp_path: Path, told: dict[str, object], text: str
) -> None:
    place, _ = packed_folder(model_root, "qwen3", tmp_path / "p", lambda _: None, told)
    with pytest.raises(BadModel) as caught:
        model_facts(place)
    assert text in str(caught.value)


def test_a_truncated_shard(model_root: Path, tmp_path: Path) -> None:
    place, _ = packed_folder(model_root, "qwen3", tmp_path / "p", everywhere(gptq()), GPTQ)
    path = place / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadModel, match="cut short"):
        open_stored(place)


def test_packed_weights_without_a_word_in_the_config(model_root: Path, tmp_path: Path) -> None:
    place, _ = packed_folder(model_root, "qwen3", tmp_path / "p", everywhere(integers), CT)
    told = json.loads((place / "config.json").read_text())
    del told["quantization_config"]
    (place / "config.json").write_text(json.dumps(told))
    with pytest.raises(BadModel, match="quantization_config"):
        decoder_of(place)
