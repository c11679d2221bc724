"""Random-weight Llama folders for benchmarks: the weights do not matter to speed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_random_llama(
    folder: Path, shape: Mapping[str, int], *, is_tied: bool = False, is_repeated: bool = False
) -> int:
    """Write a bf16 Llama folder; the number of its parameters. `is_repeated`: all layers alike, made sooner."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    query = shape["num_attention_heads"] * shape["head_dim"]
    key = shape["num_key_value_heads"] * shape["head_dim"]
    random = torch.Generator().manual_seed(0)
    drawn: dict[tuple[int, ...], torch.Tensor] = {}

    def weight(*size: int) -> torch.Tensor:
        if size not in drawn or not is_repeated:
            drawn[size] = (torch.randn(size, generator=random) * 0.02).bfloat16()
        return drawn[size].clone()

    tensors = {"model.embed_tokens.weight": weight(shape["vocab_size"], hidden)}
    for layer in range(shape["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", query, hidden),
            ("self_attn.k_proj", key, hidden),
            ("self_attn.v_proj", key, hidden),
            ("self_attn.o_proj", hidden, query),
            ("mlp.gate_proj", wide, hidden),
            ("mlp.up_proj", wide, hidden),
            ("mlp.down_proj", hidden, wide),
        ):
            tensors[f"{at}{name}.weight"] = weight(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    if not is_tied:
        tensors["lm_head.weight"] = weight(shape["vocab_size"], hidden)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": is_tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return sum(tensor.numel() for tensor in tensors.values())
