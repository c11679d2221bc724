"""Decoders whose MLPs are mixtures of experts (mlp.py), which they spell and route differently.

    mixtral     attention as mistral, without a window unless stated; expert weights sum to one
    qwen2_moe   attention as qwen2; one expert more that every token takes, through a gate of its own
    qwen3_moe   attention as qwen3, a stated window covers every layer; `norm_topk_prob` as in qwen2_moe

Qwen's `mlp_only_layers` and `decoder_sparse_step` leave a plain MLP in some layers.
"""

from __future__ import annotations

from penstock.core.errors import BadModel
from penstock.engine.torch.families.read import experts_from, late_windows, one_window, shape_from
from penstock.engine.torch.families.shape import Shape
from penstock.engine.torch.reading import Reader


def mixtral(read: Reader) -> Shape:
    read = read.over(rope_theta=1e6, rms_norm_eps=1e-5)
    layers = read.integer("num_hidden_layers")
    return shape_from(
        read,
        "mixtral",
        max_context=131072,
        windows=one_window(read),
        experts=experts_from(
            read,
            (True,) * layers,
            count=8,
            top_k=2,
            width=read.integer("intermediate_size"),
            is_normed=True,
            block="block_sparse_moe",
            gate="w1",
            up="w3",
            down="w2",
        ),
    )


def qwen2_moe(read: Reader) -> Shape:
    return shape_from(
        read,
        "qwen2_moe",
        max_context=32768,
        windows=late_windows(read),
        has_qkv_bias=read.flag("qkv_bias", True),
        experts=experts_from(
            read,
            _sparse_layers(read),
            count=60,
            top_k=4,
            width=read.integer("moe_intermediate_size", 1408),
            is_normed=read.flag("norm_topk_prob"),
            shared_width=read.integer("shared_expert_intermediate_size", 5632),
        ),
    )


def qwen3_moe(read: Reader) -> Shape:
    has_bias = read.flag("attention_bias")
    return shape_from(
        read,
        "qwen3_moe",
        max_context=32768,
        windows=one_window(read) if read.flag("use_sliding_window") else None,
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        has_qk_norm=True,
        experts=experts_from(
            read,
            _sparse_layers(read),
            count=128,
            top_k=8,
            width=read.integer("moe_intermediate_size", 768),
            is_normed=read.flag("norm_topk_prob"),
        ),
    )


def _sparse_layers(read: Reader) -> tuple[bool, ...]:
    """Qwen's choice of layers that have experts."""
    plain, step = read.config.get("mlp_only_layers") or [], read.integer("decoder_sparse_step", 1)
    if not isinstance(plain, list):
        raise BadModel(f"{read.where}: mlp_only_layers must be a list, got {plain!r}")
    layers = range(read.integer("num_hidden_layers"))
    return tuple(layer not in plain and (layer + 1) % step == 0 for layer in layers)
