"""Small random diffusion models in their own spelling, and transformers' Llama and Qwen2 without a causal mask."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from penstock.core.types import CanvasRule

MASK = 510
SIZE = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=256,
    initializer_range=0.15,
)
BLOCK = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}
TOP = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}


@cache
def saved_canvas(root: Path, name: str, seed: int = 5) -> tuple[Path, PreTrainedModel]:
    """A folder of kind "llada" or "dream", and the reference model with the same weights."""
    torch.manual_seed(seed)
    model: PreTrainedModel
    if name == "llada":
        model = LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=4, rope_theta=500000.0))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZE, num_key_value_heads=2))
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:  # biases and norms: forgetting any of them must show
                value.add_(torch.randn_like(value) * 0.1)
    folder = root / f"canvas-{name}-{seed}"
    folder.mkdir()
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    if name == "llada":
        weights = {_llada(key): value for key, value in weights.items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder, model.eval()


def _llada(key: str) -> str:
    if key in TOP:
        return TOP[key]
    _, _, layer, *rest = key.split(".")
    return f"model.transformer.blocks.{layer}.{BLOCK['.'.join(rest[:-1])]}.{rest[-1]}"


CONFIGS = {
    "llada": {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": 64,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 3,
        "mlp_hidden_size": 96,
        "mlp_ratio": 4,
        "vocab_size": 512,
        "embedding_size": 512,
        "max_sequence_length": 256,
        "rope": True,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-6,
        "layer_norm_type": "rms",
        "block_type": "llama",
        "activation_type": "silu",
        "alibi": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "mask_token_id": MASK,
        "eos_token_id": 2,
    },
    "dream": {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "hidden_act": "silu",
        **{key: value for key, value in SIZE.items() if key != "initializer_range"},
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "mask_token_id": MASK,
        "eos_token_id": 2,
    },
}


def dense_logits(model: PreTrainedModel, ids: Tensor, is_shifted: bool) -> Tensor:
    """[positions, vocab]: entry i tells position i; nothing is hidden from anybody."""
    count = len(ids)
    with torch.no_grad():
        seen = torch.zeros(1, 1, count, count)
        logits = model(ids[None], attention_mask=seen, use_cache=False).logits[0].float()
    return torch.cat((logits[:1], logits[:-1])) if is_shifted else logits


def cached_logits(
    model: torch.nn.Module, stale: Tensor, now: Tensor, start: int, is_shifted: bool
) -> Tensor:
    """transformers' own cache of all positions, its block cut out, and the block computed behind it."""
    count, end = len(stale), start + len(now)
    outside = torch.tensor([at for at in range(count) if not start <= at < end])
    with torch.no_grad():
        told = model(stale[None], attention_mask=torch.zeros(1, 1, count, count), use_cache=True)
        cache = told.past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, outside], layer.values[:, :, outside]
        logits = model(
            now[None],
            attention_mask=torch.zeros(1, 1, len(now), count),
            position_ids=torch.arange(start, end)[None],
            past_key_values=cache,
        ).logits[0]
    return torch.cat((logits[:1], logits[:-1])) if is_shifted else logits


def dense_answer(
    model: PreTrainedModel, prompt: list[int], num_masks: int, rule: CanvasRule, is_shifted: bool
) -> list[int]:
    """The answer when every step computes everything: low-confidence remasking, block by block.

    Where the rule reuses, a step sees what transformers' own cache holds of all positions outside the block.
    """
    ids = torch.tensor(prompt + [MASK] * num_masks)
    masked = torch.arange(len(ids)) >= len(prompt)
    stale = ids
    for start in range(len(prompt), len(ids), rule.block_tokens):
        inside = torch.zeros(len(ids), dtype=torch.bool)
        inside[start : start + rule.block_tokens] = True
        for step in range(rule.steps):
            here = (inside & masked).nonzero()[:, 0]
            if not len(here):
                break
            phase = rule.phase(step)
            if phase == "reuse":
                now = ids[start : start + rule.block_tokens]
                logits = cached_logits(model, stale, now, start, is_shifted)[here - start]
            else:
                stale = ids.clone() if phase == "refresh" else ids
                logits = dense_logits(model, ids, is_shifted)[here]
            logits[:, MASK] = -torch.inf
            best = logits.softmax(-1).max(-1)
            count = -(-len(here) // (rule.steps - step))
            if rule.threshold is not None:
                count = max(count, int((best.values >= rule.threshold).sum()))
            chosen = best.values.argsort(descending=True, stable=True)[:count]
            if is_shifted and step == 0 and 0 not in chosen:
                chosen = torch.cat((torch.tensor([0]), chosen[:-1]))
            ids[here[chosen]] = best.indices[chosen]
            masked[here[chosen]] = False
    answer: list[int] = ids[len(prompt) :].tolist()
    return answer
