"""Gemma 2 and 3: RMS norms of weight 1 + w around both parts of a layer, GELU gates, scaled embeddings, a tied head.

    gemma2       windows in every other layer; scores and logits capped; scores scaled by query_pre_attn_scalar
    gemma3_text  windows in all but every sixth layer, and there positions turn by a theta of their own; head norms
    gemma3       the same inside `text_config`; the vision tower beside it is not read

Published files leave out what equals the class default, hence the many defaults here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.core.errors import BadModel
from penstock.engine.torch.families.read import Windows, refuse, shape_from, typed_windows
from penstock.engine.torch.families.shape import Names, Shape
from penstock.engine.torch.positions import Rope, read_rope
from penstock.engine.torch.reading import Config, Reader

NAMES = Names(
    mlp_norm="pre_feedforward_layernorm",
    attention_post="post_attention_layernorm",
    mlp_post="post_feedforward_layernorm",
)
SIZES = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}


def gemma2(read: Reader) -> Shape:
    read = read.over(**SIZES, vocab_size=256000)
    return _gemma(
        read,
        "gemma2",
        max_context=8192,
        windows=_windows(read, 2),
        score_cap=_cap(read, "attn_logit_softcapping", 50.0),
        logit_cap=_cap(read, "final_logit_softcapping", 30.0),
    )


def gemma3_text(read: Reader) -> Shape:
    read = read.over(**SIZES, vocab_size=262208)
    refuse(read, "attn_logit_softcapping")
    context = read.integer("max_position_embeddings", 131072)
    rope, local = _ropes(read, context)
    pattern = read.integer("sliding_window_pattern", 6)
    shape = _gemma(
        read,
        "gemma3",
        max_context=context,
        windows=_windows(read, pattern),
        logit_cap=_cap(read, "final_logit_softcapping", None),
        has_qk_norm=True,
        rope=rope,
        local_rope=local,
    )
    return replace(shape, max_context=context)  # the file states the stretched context


def gemma3(read: Reader) -> Shape:
    text = read.config.get("text_config")
    if not isinstance(text, Mapping):
        raise BadModel(f"{read.where}: text_config must be a table, got {text!r}")
    stored = {key: read.config[key] for key in ("dtype", "torch_dtype") if key in read.config}
    return gemma3_text(Reader({**stored, **text}, read.where))


def _gemma(read: Reader, family: str, *, max_context: int, **facts: Any) -> Shape:
    refuse(read, "use_bidirectional_attention", why="needs attention without a causal mask")
    has_bias = read.flag("attention_bias")
    return shape_from(
        read,
        family,
        max_context=max_context,
        norm="rms_offset",
        names=NAMES,
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        score_scale=read.number("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=read.integer("hidden_size") ** 0.5,
        **facts,
    )


def _windows(read: Reader, pattern: int) -> Windows:
    """All layers but every `pattern`-th, unless the file lists them."""
    window = read.integer("sliding_window", 4096)
    layers = range(1, read.integer("num_hidden_layers") + 1)
    typed = typed_windows(read, window)
    return typed or tuple(window if layer % pattern else None for layer in layers)


def _cap(read: Reader, key: str, silent: float | None) -> float | None:
    """A file may say null, which switches a cap off."""
    told = read.config.get(key, silent)
    return None if told is None else read.number(key, silent or 0.0)


def _ropes(read: Reader, context: int) -> tuple[Rope, Rope]:
    """(of layers that see everything, of layers with a window). Scaling concerns the former only."""
    told = read.config.get("rope_parameters")
    if isinstance(told, Mapping) and ("full_attention" in told or "sliding_attention" in told):
        whole, local = told.get("full_attention") or {}, told.get("sliding_attention") or {}
    else:
        theta = read.config.get("rope_theta")
        whole = {**(read.config.get("rope_scaling") or {}), "rope_theta": theta}  # type: ignore[dict-item]
        local = {"rope_theta": read.config.get("rope_local_base_freq")}
    return (
        _rope(read, whole, 1e6, context),
        _rope(read, local, 1e4, context),
    )


def _rope(read: Reader, told: Config, silent: float, context: int) -> Rope:
    theta = told.get("rope_theta") or silent
    return read_rope({"rope_parameters": {**told, "rope_theta": theta}}, context, read.where)
