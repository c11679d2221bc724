"""Every way in which a model folder can be broken is a BadModel that names the file or tensor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.core.errors import BadConfig, BadModel
from penstock.engine.folder import DEFAULT_FOLDER, local_folder, model_facts
from penstock.engine.torch.build import EngineConfig, choose_device
from penstock.engine.torch.families import read_shape
from penstock.engine.torch.hub import find_model
from penstock.engine.torch.open import open_executor
from tests.engine.torch.models import saved

SHARD = "model-00002-of-00007.safetensors"


@pytest.fixture
def folder(model_root: Path, tmp_path: Path) -> Path:
    """A sharded model that a test may break."""
    whole, _ = saved(model_root, "llama2")
    return Path(shutil.copytree(whole, tmp_path / "broken"))


def edit(path: Path, **changes: object) -> None:
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, **changes}))


def without_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def cut_shard(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: len(data) // 2])


def empty_shard(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"")


def pointer_shard(folder: Path) -> None:
    (folder / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")


def without_tensor(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    tensors.pop("model.layers.0.mlp.down_proj.weight", None) or tensors.popitem()
    save_file(tensors, folder / SHARD)


def wrong_shape(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=80)


def integers(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    save_file({name: value.to(torch.int8) for name, value in tensors.items()}, folder / SHARD)


def only_bin(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def unknown_family(folder: Path) -> None:
    edit(folder / "config.json", architectures=["GPT2LMHeadModel"])


def quantised(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "aqlm"})


def dynamic_rope(folder: Path) -> None:
    edit(
        folder / "config.json", rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2}
    )


def no_layers(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers="many")


BREAKS: list[tuple[Callable[[Path], None], str]] = [
    (without_shard, SHARD),
    (cut_shard, SHARD),
    (empty_shard, SHARD),
    (pointer_shard, "git lfs pull"),
    (without_tensor, "model."),
    (wrong_shape, "gate_proj.weight"),
    (integers, "floating"),
    (only_bin, "safetensors"),
    (broken_index, "index.json"),
    (without_config, "config.json is missing"),
    (unknown_family, "GPT2LMHeadModel"),
    (quantised, "quantised by aqlm"),
    (dynamic_rope, "dynamic"),
    (no_layers, "num_hidden_layers"),
]


@pytest.mark.parametrize(("damage", "told"), BREAKS, ids=[d.__name__ for d, _ in BREAKS])
def test_broken(folder: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(folder)
    with pytest.raises(BadModel) as caught:
        open_executor(str(folder), EngineConfig(device="cpu", num_blocks=4))
    assert told in str(caught.value)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="no model folder"):
        find_model(str(tmp_path / "nowhere" / "deeper" / "still"))
    with pytest.raises(BadModel, match="config.json is missing"):
        model_facts(tmp_path)
    assert local_folder("default") == DEFAULT_FOLDER


def test_memory_that_holds_nothing(model_root: Path) -> None:
    whole, _ = saved(model_root, "llama2")
    with pytest.raises(BadConfig, match="no block"):
        open_executor(str(whole), EngineConfig(device="cpu", memory_bytes=100))
    if not torch.cuda.is_available():
        with pytest.raises(BadConfig, match="no CUDA"):
            choose_device("cuda")


def test_heads_that_do_not_divide(model_root: Path) -> None:
    whole, _ = saved(model_root, "qwen3")
    with pytest.raises(BadModel, match="do not divide over 3"):
        open_executor(str(whole), EngineConfig(device="cpu", tensor_parallel=3, num_blocks=4))


def test_facts_need_no_torch(model_root: Path) -> None:
    whole, _ = saved(model_root, "qwen3")
    program = (
        "import sys\nfrom penstock.engine.folder import model_facts\n"
        f"facts = model_facts({str(whole)!r})\n"
        "assert 'torch' not in sys.modules\n"
        "print(facts.vocab_size, facts.max_context, facts.eos_ids, facts.num_layers, facts.kv_bytes_per_token)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    # 2 x 3 layers x 2 heads x 32 x 4 bytes; in eight bits each 32 with a scale in fp32
    assert said.split("\n")[0] == "512 512 (2,) 3 {'fp32': 1536, 'bf16': 768, 'int8': 432}"


def test_both_spellings_of_rope() -> None:
    """Published configurations of both ages mean the same."""
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
    }
    scaling = {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    old = read_shape({**llama, "rope_theta": 500000.0, "rope_scaling": scaling}, "c")
    new = read_shape({**llama, "rope_parameters": {**scaling, "rope_theta": 500000.0}}, "c")
    assert old == new and old.rope.theta == 500000.0 and old.max_context == 131072
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    shape = read_shape(
        {**llama, "max_position_embeddings": 32768, "rope_theta": 1e6, "rope_scaling": yarn}, "c"
    )
    assert shape.max_context == 131072 and shape.rope.attention_factor == pytest.approx(1.138629)


def test_windows() -> None:
    qwen = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "sliding_window": 32,
        "max_window_layers": 2,
    }
    assert read_shape(qwen, "c").windows == (None,) * 4
    on = {**qwen, "use_sliding_window": True}
    assert read_shape(on, "c").windows == (None, None, 32, 32)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert read_shape({**on, "layer_types": kinds}, "c").windows == (32, None, 32, None)
    mistral = {**qwen, "architectures": ["MistralForCausalLM"]}
    assert read_shape(mistral, "c").windows == (32,) * 4
    assert read_shape({**mistral, "sliding_window": None}, "c").windows == (None,) * 4
