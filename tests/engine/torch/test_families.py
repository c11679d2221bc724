"""What families do that the common matrix does not show: files as they are published, parts that are left unread."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    SiglipVisionConfig,
)

from penstock.core.errors import BadModel
from penstock.core.types import Sampling
from penstock.engine.folder import model_facts, read_json
from penstock.engine.torch import kernels
from penstock.engine.torch.build import Built, EngineConfig, build_decoder
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.families import read_shape
from penstock.engine.torch.load import check_split
from penstock.engine.torch.open import open_executor
from tests.engine.torch.driver import GREEDY, Driver
from tests.engine.torch.models import FAMILIES, LONGROPE, SIZE, saved
from tests.engine.torch.test_against_transformers import TOLERANCE, logits_of

ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=40)
IDS = np.array([3 + (11 * at) % 500 for at in range(100)])


def built_from(folder: Path, **changes: object) -> Built:
    return build_decoder(model_facts(folder), replace(ENGINE, **changes), Alone(), None)  # type: ignore[arg-type]


def agrees(built: Built, model: PreTrainedModel, count: int) -> bool:
    with torch.inference_mode():
        got = logits_of(built, IDS, 0, count)
        want = model(torch.tensor(IDS[:count])[None]).logits[0]
    return bool((got - want).abs().max() < TOLERANCE)


def test_longrope_goes_by_the_longest_text_allowed(tmp_path: Path) -> None:
    """transformers goes by the text in hand: equal to it where no text, or every text, is a long one."""
    factors = {"short_factor": [1.0] * 12, "long_factor": [1.5 + at for at in range(12)]}
    config = Phi3Config(
        **{**SIZE, "num_attention_heads": 2, "num_key_value_heads": 1},
        original_max_position_embeddings=64,
        rope_parameters={**LONGROPE, **factors},
    )
    model = Phi3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    short, long = built_from(tmp_path, max_context=64), built_from(tmp_path)
    assert short.notes["rope"].startswith("short") and long.notes["rope"].startswith("long")
    assert agrees(short, model, 64) and not agrees(short, model, 65)
    assert agrees(long, model, 65) and agrees(long, model, 100) and not agrees(long, model, 64)


def test_the_text_model_beside_a_vision_tower(tmp_path: Path) -> None:
    text = Gemma3TextConfig(**{**SIZE, **FAMILIES["gemma3"][2]})
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=14
    )  # fmt: skip
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=1,
        boi_token_index=509,
        eoi_token_index=510,
        image_token_index=511,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    built = built_from(tmp_path)
    assert agrees(built, model, 60)
    assert "vision_tower" in built.notes["skipped"]
    assert "multi_modal_projector" in built.notes["skipped"]


@pytest.fixture
def folder(model_root: Path, tmp_path: Path) -> Path:
    whole, _ = saved(model_root, "deepseek-lite")
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_layers_beyond_the_last_are_skipped(folder: Path) -> None:
    """Where checkpoints keep layers that predict several tokens at once."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.eh_proj.weight"] = torch.zeros(4, 4)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    edited(folder, add)
    assert built_from(folder).notes["skipped"].endswith("model.layers.3 (1)")


def test_a_layer_holds_nothing_that_config_json_does_not_mean(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(160)

    edited(folder, add)
    with pytest.raises(BadModel, match="q_proj.bias.*no place"):
        built_from(folder)


def test_weights_of_eight_bits_are_refused(folder: Path) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    edited(folder, shrink)
    with pytest.raises(BadModel, match="up_proj.*float8_e4m3fn"):
        built_from(folder)


REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("deepseek-lite", {"architectures": ["DeepseekV4ForCausalLM"]}, "DeepseekV4ForCausalLM"),
    ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func"),
    ("deepseek-v3", {"rope_interleave": False}, "rope_interleave"),
    ("deepseek-v3", {"topk_group": 5}, "5 of 4 groups"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "must list 4 layers"),
    ("deepseek-lite", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("deepseek-lite", {"topk_method": "noaux_tc"}, "noaux_tc"),
    ("deepseek-lite", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("deepseek-v2", {"topk_group": 5}, "5 of 4 groups"),
    ("gemma3", {"use_bidirectional_attention": True}, "causal mask"),
    ("gemma2", {"hidden_activation": "relu"}, "relu"),
    ("gemma2", {"layer_types": ["full_attention"]}, "lists 1 of 3 layers"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    ("phi3-long", {"rope_parameters": {**LONGROPE, "long_factor": [1.0]}}, "12 pairs"),
    ("phi3-long", {"rope_parameters": {**LONGROPE, "long_factor": None}}, "list of positive"),
    ("phi", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "in .0, 1."),
    ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
]


@pytest.mark.parametrize(("name", "changes", "told"), REFUSED)
def test_variants_that_are_refused(
    model_root: Path, name: str, changes: dict[str, object], told: str
) -> None:
    config = read_json(saved(model_root, name)[0] / "config.json")
    with pytest.raises(BadModel, match=told):
        read_shape({**config, **changes}, "config.json")


def test_files_that_leave_out_what_is_usual() -> None:
    """Gemma 3 4B says seven things about its text model, Gemma 2 2B has no kinds of layers, Phi 3 has an older word."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "torch_dtype": "bfloat16"}
    shape = read_shape({**config, "text_config": text}, "c")
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (8, 4, 256)
    assert (shape.vocab_size, shape.max_context, shape.is_tied) == (262208, 131072, True)
    assert shape.windows == tuple(None if at % 6 == 5 else 1024 for at in range(34))
    assert (shape.rope.theta, shape.rope.factor) == (1e6, 8.0)
    assert shape.local_rope is not None and shape.local_rope.theta == 1e4
    assert shape.local_rope.kind == "default" and shape.stored_dtype == "bf16"
    assert (shape.logit_cap, shape.score_cap, shape.scale) == (None, None, 1 / 16)
    shape = read_shape({"model_type": "gemma2", "sliding_window": 4096}, "c")
    assert shape.windows[:3] == (4096, None, 4096)
    assert (shape.score_cap, shape.logit_cap, shape.max_context) == (50.0, 30.0, 8192)
    assert (
        read_shape({"model_type": "gemma2", "attn_logit_softcapping": None}, "c").score_cap is None
    )
    factors = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    phi3 = {
        "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 2, "num_attention_heads": 32, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rope_scaling": factors, "sliding_window": 262144,
    }  # fmt: skip
    shape = read_shape(phi3, "c")
    assert shape.max_context == 131072 and shape.rope.attention_factor == pytest.approx(
        1.19024, abs=1e-5
    )
    assert read_shape({**phi3, "rope_scaling": {**factors, "type": "yarn"}}, "c") == shape


def test_what_a_position_leaves_in_the_cache(model_root: Path) -> None:
    """DeepSeek: one vector of rank + rotated numbers a layer, in the facts and in the arena."""
    place, _ = saved(model_root, "deepseek-lite")
    each = 3 * (32 + 16) * 4
    assert model_facts(place).kv_bytes_per_token["fp32"] == each
    built = built_from(place)
    assert built.decoder.attention is not None
    assert built.decoder.attention.num_bytes == 40 * 16 * each
    facts = model_facts(saved(model_root, "deepseek-v2")[0])
    assert facts.kv_bytes_per_token["int8"] == 3 * (40 + 16 + 4)
    if kernels.available():  # they want whole vectors, and say so
        assert built.notes["attention"].startswith("cpu-paged")
        other = built_from(saved(model_root, "deepseek-v2")[0])
        assert "multiple of 16" in other.notes["attention"]


@pytest.mark.parametrize("name", ["gemma3", "phi", "deepseek-lite"])
async def test_groups_of_layers(model_root: Path, name: str) -> None:
    """The same text when a prompt passes its layers in two plans."""
    executor = open_executor(str(saved(model_root, name)[0]), ENGINE)
    driver, layers = Driver(executor), executor.caps.num_layers
    whole, parted = driver.job(IDS[:40].tolist()), driver.job(IDS[:40].tolist())
    await driver.finish([whole], 8)
    for part in ((0, 1), (1, layers)):
        await driver.step([(parted, 40)], {parted.seq: part})
    await driver.finish([parted], 8)
    assert parted.outputs == whole.outputs
    await executor.stop()


async def test_any_of_several_end_tokens_ends_a_text(model_root: Path, tmp_path: Path) -> None:
    """Those of generation_config.json, which chat models list there."""
    place, _ = saved(model_root, "gemma2")
    folder = Path(shutil.copytree(place, tmp_path / "m"))
    executor = open_executor(str(folder), ENGINE)
    driver = Driver(executor)
    job = driver.job(IDS[:20].tolist(), GREEDY)
    await driver.finish([job], 6)
    await executor.stop()
    ends = [job.outputs[4], job.outputs[2], 499]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert model_facts(folder).eos_ids == tuple(ends)
    executor = open_executor(str(folder), ENGINE)
    driver = Driver(executor)
    again = driver.job(IDS[:20].tolist(), Sampling(temperature=0.0))
    await driver.finish([again], 6)
    assert again.outputs == job.outputs
    told = [out.is_stop for out in again.sampled]
    assert told == [token in ends for token in job.outputs] and sum(told) >= 2
    await executor.stop()


def test_norms_over_all_heads_are_not_split(model_root: Path) -> None:
    shape = model_facts(saved(model_root, "olmo2")[0]).shape
    check_split(shape, 1, "olmo2")
    with pytest.raises(BadModel, match="norms over all heads"):
        check_split(shape, 2, "olmo2")
