"""A trained decoder as a folder that Hugging Face libraries (and Penstock's own engine) open as a Qwen3 model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from penstock.learn.local.decoder import Decoder, Shape
from penstock.learn.local.dialogue import TEXT_END, TURN_END
from penstock.learn.local.tokenizer import save_tokenizer, special_id

LARGEST_WEIGHTS = 25_000_000


def export(model: Decoder, tokenizer: Tokenizer, folder: Path) -> Path:
    """Write config, bf16 weights, generation defaults and tokenizer; refuses weights over 25 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = [special_id(tokenizer, TURN_END), special_id(tokenizer, TEXT_END)]
    _write(folder / "config.json", config(model.shape, ends))
    defaults = {
        "eos_token_id": ends,
        "pad_token_id": ends[1],
        "do_sample": True,
        "temperature": 0.4,
        "top_p": 0.95,
    }
    _write(folder / "generation_config.json", defaults)
    save_tokenizer(tokenizer, folder, model.shape.max_position_embeddings)
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
    }
    size = sum(2 * weight.numel() for weight in weights.values())
    if size > LARGEST_WEIGHTS - 100_000:
        raise ValueError(
            f"{size} bytes of weights are more than the {LARGEST_WEIGHTS} an embedded model may have"
        )
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    return folder


def config(shape: Shape, ends: list[int]) -> dict[str, Any]:
    """The content of `config.json`, readable by old and new versions of transformers."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **shape.as_dict(),
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": shape.num_hidden_layers,
        "layer_types": ["full_attention"] * shape.num_hidden_layers,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": ends,
        "pad_token_id": ends[1],
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def load(folder: Path) -> tuple[Decoder, Tokenizer]:
    """The decoder (in fp32) and the tokenizer of an exported folder."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(**{name: settings[name] for name in Shape.__dataclass_fields__})
    model = Decoder(shape)
    model.load_state_dict(
        {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    )
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
