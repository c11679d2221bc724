"""What is wrong with an adapter's folder is said in one sentence, before anything is served with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.core.errors import BadConfig, BadModel
from penstock.engine.adapter_folder import CONFIG, WEIGHTS, adapter_facts, adapter_key, name_of
from penstock.engine.folder import model_facts
from penstock.engine.torch.adapters.store import AdapterStore
from penstock.engine.torch.build import build_decoder
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.open import EngineConfig, open_leaf
from tests.engine.torch.adapters.made import write_adapter
from tests.engine.torch.adapters.test_exact import ENGINE
from tests.engine.torch.models import saved

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def adapter(model_root: Path, tmp_path: Path) -> Path:
    write_adapter(tmp_path / "a", saved(model_root, "qwen3")[1])
    return tmp_path / "a"


def opened(model_root: Path, adapter: Path, family: str = "qwen3", rank: int = 16) -> AdapterStore:
    built = build_decoder(model_facts(saved(model_root, family)[0]), ENGINE, Alone(), None)
    return AdapterStore(
        built.decoder, slots=1, rank=rank, device=built.device, folders={"a": adapter}
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "r must be a positive integer"),
        ({"lora_alpha": "much"}, "lora_alpha must be a number"),
        ({"target_modules": None}, "target_modules is empty"),
        ({"target_modules": "(("}, "no regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj must be"),
        ({"init_lora_weights": "pissa_niter_4"}, "whose weights were changed"),
        ({"layers_to_transform": "first"}, "layers_to_transform must list"),
    ],
)
def test_configs_that_are_refused(adapter: Path, changes: dict[str, object], said: str) -> None:
    told = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(told | changes))
    with pytest.raises(BadModel, match=said.replace("(", r"\(")) as error:
        adapter_facts(adapter)
    assert str(adapter) in error.value.message


def without_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".2." in name]:
        del tensors[name]


def with_embedding(tensors: Tensors) -> None:
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 512)


def with_untargeted(tensors: Tensors) -> None:
    for side, shape in (("A", (4, 64)), ("B", (64, 4))):
        tensors[f"base_model.model.model.layers.0.self_attn.k_proj.lora_{side}.weight"] = (
            torch.zeros(shape)
        )


def with_wide(tensors: Tensors) -> None:
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors[name] = torch.zeros(4, 65)


def without_b(tensors: Tensors) -> None:
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_layer, "has nothing for model.layers.2.self_attn.q_proj"),
        (with_embedding, "not one of a linear layer's LoRA"),
        (with_untargeted, "k_proj (is not among target_modules|.*lora_B has shape)"),
        (with_wide, r"lora_A has shape \[4, 65\], .* ask for \[4, 64\]"),
        (without_b, "lora_B has shape None"),
    ],
)
def test_weights_that_are_refused(
    model_root: Path, adapter: Path, change: Callable[[Tensors], None], said: str
) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(BadModel, match=said):
        opened(model_root, adapter)


def test_files_that_are_refused(model_root: Path, adapter: Path) -> None:
    with pytest.raises(BadModel, match=r"rank 4, this engine holds ranks up to 3") as error:
        opened(model_root, adapter, rank=3)
    assert "adapter_rank" in error.value.hint
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadModel, match="cannot be read"):
        opened(model_root, adapter)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(BadModel, match=WEIGHTS):
        adapter_facts(adapter)
    with pytest.raises(BadModel, match="no adapter folder"):
        adapter_facts(adapter / "none")


def test_an_adapter_of_experts_or_of_another_model(model_root: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "experts", saved(model_root, "deepseek-lite")[1], targets=("o_proj",))
    with pytest.raises(BadModel, match=r"o_proj cannot be adapted in this model"):
        opened(model_root, tmp_path / "experts", "deepseek-lite")
    with pytest.raises(BadModel, match="lora_A has shape"):
        opened(model_root, tmp_path / "experts")


def test_a_key_follows_the_files(adapter: Path) -> None:
    first = adapter_key("mine", adapter)
    assert name_of(first) == "mine" and first == adapter_key("mine", adapter)
    (adapter / CONFIG).write_text((adapter / CONFIG).read_text().replace('"r": 4', '"r":  4'))
    assert adapter_key("mine", adapter) != first


def test_files_that_change_while_they_are_served(model_root: Path, adapter: Path) -> None:
    store, key = opened(model_root, adapter), adapter_key("a", adapter)
    store.know(key, adapter)
    store._fill(key, 0)
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: one + 1 for name, one in tensors.items()}, adapter / WEIGHTS)
    with pytest.raises(BadModel, match="have changed since it was loaded"):
        store._fill(key, 0)


def test_where_there_can_be_none(model_root: Path, adapter: Path) -> None:
    folder = str(saved(model_root, "qwen3")[0])
    config = EngineConfig(device="cpu", tensor_parallel=2, max_adapters=1, adapters={"a": adapter})
    with pytest.raises(BadConfig, match="split over several processes takes no adapters"):
        open_leaf(folder, config)
