"""Pre-norm decoders with grouped-query attention and gated SiLU MLPs; they differ in biases, windows and head norms.

llama     attention_bias covers q, k, v and o; mlp_bias covers all three MLP layers
mistral   no biases; `sliding_window` covers every layer (4096 where the file does not say)
qwen2     q, k, v always have a bias, o never; `use_sliding_window` from layer `max_window_layers` on
qwen3     per-head RMS norm of q and k before the rotation; attention_bias as llama; windows as qwen2
smollm3   as llama; every fourth layer is not told positions
granite   as llama; four factors: of embeddings, scores, what parts put out, and (dividing) logits
olmo2     norms behind both parts instead of before; queries and keys normed over all heads
"""

from __future__ import annotations

from typing import Any

from penstock.core.errors import BadModel
from penstock.engine.torch.families.read import late_windows, shape_from
from penstock.engine.torch.families.shape import Names, Shape
from penstock.engine.torch.reading import Reader

OLMO2 = Names(attention_post="post_attention_layernorm", mlp_post="post_feedforward_layernorm")


def llama(read: Reader) -> Shape:
    return _llama(read, "llama")


def _llama(read: Reader, family: str, max_context: int = 2048, **facts: Any) -> Shape:
    has_bias = read.flag("attention_bias")
    return shape_from(
        read,
        family,
        max_context=max_context,
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        has_mlp_bias=read.flag("mlp_bias"),
        **facts,
    )


def smollm3(read: Reader) -> Shape:
    read = read.over(tie_word_embeddings=True, rope_theta=2e6)
    layers, told = read.integer("num_hidden_layers"), read.config.get("no_rope_layers")
    if told is None:
        every = read.integer("no_rope_layer_interval", 4)
        told = [int((layer + 1) % every != 0) for layer in range(layers)]
    if not isinstance(told, list) or len(told) != layers:
        raise BadModel(f"{read.where}: no_rope_layers must list {layers} layers, got {told!r}")
    turns = tuple(bool(one) for one in told)
    windows = late_windows(read) if read.config.get("layer_types") else None
    return _llama(read, "smollm3", 32768, turns=turns, windows=windows)


def granite(read: Reader) -> Shape:
    return _llama(
        read,
        "granite",
        embedding_scale=read.number("embedding_multiplier", 1.0),
        score_scale=read.number("attention_multiplier", 1.0),
        part_scale=read.number("residual_multiplier", 1.0),
        logit_scale=1 / read.number("logits_scaling", 1.0),
    )


def olmo2(read: Reader) -> Shape:
    read = read.over(rms_norm_eps=1e-5)
    return _llama(read, "olmo2", names=OLMO2, is_post_normed=True, has_wide_norm=True)


def mistral(read: Reader) -> Shape:
    window = read.config.get("sliding_window", 4096)
    if window is not None:
        window = read.integer("sliding_window", 4096)
    layers = read.integer("num_hidden_layers")
    return shape_from(read, "mistral", max_context=131072, windows=(window,) * layers)


def qwen2(read: Reader) -> Shape:
    return shape_from(
        read, "qwen2", max_context=32768, windows=late_windows(read), has_qkv_bias=True
    )


def qwen3(read: Reader) -> Shape:
    has_bias = read.flag("attention_bias")
    return shape_from(
        read,
        "qwen3",
        max_context=32768,
        head_dim=128,
        windows=late_windows(read),
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        has_qk_norm=True,
    )
