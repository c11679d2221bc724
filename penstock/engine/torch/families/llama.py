"""Pre-norm decoders with grouped-query attention and gated SiLU MLPs; they differ in biases, windows and head norms.

llama     attention_bias covers q, k, v and o; mlp_bias covers all three MLP layers
mistral   no biases; `sliding_window` covers every layer (4096 where the file does not say)
qwen2     q, k, v always have a bias, o never; `use_sliding_window` from layer `max_window_layers` on
qwen3     per-head RMS norm of q and k before the rotation; attention_bias as llama; windows as qwen2
"""

from __future__ import annotations

from penstock.engine.torch.families.read import late_windows, shape_from
from penstock.engine.torch.families.shape import Shape
from penstock.engine.torch.reading import Reader


def llama(read: Reader) -> Shape:
    has_bias = read.flag("attention_bias")
    return shape_from(
        read,
        "llama",
        max_context=2048,
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        has_mlp_bias=read.flag("mlp_bias"),
    )


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
