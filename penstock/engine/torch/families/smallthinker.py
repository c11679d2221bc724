"""SmallThinker: mixtures whose router reads the stream as it enters the layer, before attention, so that whoever keeps
experts elsewhere knows early which are needed. Gates are ReLUs. Layers say one by one whether positions are told to
them and whether they have a window.
"""

from __future__ import annotations

from dataclasses import replace

from penstock.core.errors import BadModel
from penstock.engine.torch.families.read import experts_from, refuse, shape_from
from penstock.engine.torch.families.shape import Shape
from penstock.engine.torch.reading import Reader


def smallthinker(read: Reader) -> Shape:
    refuse(read, "use_qk_norm", "moe_enable_secondary_experts", "moe_shared_primary_experts")
    width = read.integer("moe_ffn_hidden_size", 768)
    read = read.over(
        tie_word_embeddings=True,
        rope_theta=1e6,
        intermediate_size=width,
        num_experts=read.integer("moe_num_primary_experts", 32),
        num_experts_per_tok=read.integer("moe_num_active_primary_experts", 4),
    )
    if not all(_layout(read, "moe_layer_layout", 1)):
        raise BadModel(f"{read.where}: layers without experts are not supported")
    if not read.flag("moe_enable_early_router", True):
        raise BadModel(f"{read.where}: moe_enable_early_router = false is not supported")
    window = read.integer("sliding_window_size", 4096)
    slides = _layout(read, "sliding_window_layout", 0)
    experts = experts_from(
        read,
        (True,) * read.integer("num_hidden_layers"),
        count=32,
        top_k=4,
        width=width,
        is_normed=True,
        scores="softmax" if read.flag("moe_primary_router_apply_softmax") else "sigmoid",
        is_early=True,
        block="block_sparse_moe",
        router="primary_router",
        gate="gate",
        up="up",
        down="down",
    )
    shape = shape_from(
        read,
        "smallthinker",
        max_context=131072,
        head_dim=128,
        turns=tuple(_layout(read, "rope_layout", 1)),
        windows=tuple(window if one else None for one in slides),
        experts=experts,
    )
    return replace(shape, activation="relu")


def _layout(read: Reader, key: str, silent: int) -> list[bool]:
    """One entry a layer."""
    layers = read.integer("num_hidden_layers")
    told = read.config.get(key, [silent] * layers)
    if not isinstance(told, list) or len(told) != layers:
        raise BadModel(f"{read.where}: {key} must list {layers} layers, got {told!r}")
    return [bool(one) for one in told]
