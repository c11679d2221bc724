"""What families read alike: sizes, windows, experts, activations. Raises BadModel that names file and key."""

from __future__ import annotations

from typing import Any

from penstock.core.errors import BadModel
from penstock.engine.torch.families.shape import STORED, Activation, Experts, Shape
from penstock.engine.torch.positions import check_factors, read_rope, stretched
from penstock.engine.torch.reading import Reader

Windows = tuple[int | None, ...]
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def shape_from(
    read: Reader,
    family: str,
    *,
    max_context: int,
    head_dim: int | None = None,
    windows: Windows | None = None,
    turns_partly: bool = False,
    **facts: Any,
) -> Shape:
    """A shape from the keys that families share; `facts` are fields of Shape that they do not, or read otherwise.

    `turns_partly`: the family is one of those that may turn only a part of each head.
    """
    hidden = read.integer("hidden_size")
    heads = read.integer("num_attention_heads")
    layers = read.integer("num_hidden_layers")
    kv_heads = facts.pop("num_kv_heads", None) or read.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise BadModel(
            f"{read.where}: {heads} attention heads do not divide over {kv_heads} key/value heads"
        )
    told_context = read.integer("max_position_embeddings", max_context)
    rope = facts.pop("rope", None) or read_rope(read.config, told_context, read.where)
    width = facts.pop("width", None) or read.integer("head_dim", head_dim or hidden // heads)
    if rope.partial != 1.0 and not turns_partly:
        raise BadModel(f"{read.where}: partial_rotary_factor {rope.partial} is not supported")
    check_factors(rope, facts.pop("rotated", width), read.where)
    told_eps = facts.pop("norm_eps", None) or read.number("rms_norm_eps", 1e-6)
    stored = read.config.get("dtype") or read.config.get("torch_dtype") or "float32"
    return Shape(
        family=family,
        vocab_size=read.integer("vocab_size"),
        hidden=hidden,
        intermediate=read.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        norm_eps=told_eps,
        max_context=stretched(told_context, rope),
        rope=rope,
        windows=windows or (None,) * layers,
        is_tied=read.flag("tie_word_embeddings"),
        activation=activation_of(read),
        stored_dtype=STORED.get(str(stored), "fp32"),
        **facts,
    )


def activation_of(read: Reader) -> Activation:
    """`hidden_activation` is Gemma's word, and goes first as it does there."""
    name = read.config.get("hidden_activation") or read.config.get("hidden_act") or "silu"
    found = ACTIVATIONS.get(str(name))
    if found is None:
        raise BadModel(
            f"{read.where}: hidden_act {name!r} is not supported",
            hint=f"supported are {', '.join(ACTIVATIONS)}",
        )
    return found


def refuse(read: Reader, *keys: str, why: str = "is not supported") -> None:
    """Raises BadModel where one of these is switched on."""
    for key in keys:
        if read.config.get(key):
            raise BadModel(f"{read.where}: {key} = {read.config[key]!r} {why}")


def one_window(read: Reader) -> Windows | None:
    """The same stated window in every layer."""
    if read.config.get("sliding_window") is None:
        return None
    return (read.integer("sliding_window"),) * read.integer("num_hidden_layers")


def typed_windows(read: Reader, window: int) -> Windows | None:
    """A window in the layers that `layer_types` calls sliding; None where the file lists no kinds."""
    kinds, layers = read.config.get("layer_types"), read.integer("num_hidden_layers")
    if not isinstance(kinds, list):
        return None
    if len(kinds) != layers:
        raise BadModel(f"{read.where}: layer_types lists {len(kinds)} of {layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def late_windows(read: Reader) -> Windows:
    """Qwen's windows: `layer_types` where given, else from `max_window_layers` on, and only if switched on."""
    layers = read.integer("num_hidden_layers")
    if not read.flag("use_sliding_window"):
        return (None,) * layers
    window = read.integer("sliding_window", 4096)
    typed = typed_windows(read, window)
    if typed is not None:
        return typed
    first = read.config.get("max_window_layers", 28)
    if not isinstance(first, int) or first < 0:
        raise BadModel(f"{read.where}: max_window_layers must be an integer, got {first!r}")
    return tuple(window if layer >= first else None for layer in range(layers))


def experts_from(
    read: Reader, layers: tuple[bool, ...], *, count: int, top_k: int | None, **more: Any
) -> Experts | None:
    """None where no layer has any. `count` and `top_k` are what the family takes when the file is silent."""
    if not any(layers):
        return None
    keys = ("n_routed_experts", "num_local_experts", "num_experts")
    key = next((key for key in keys if read.config.get(key)), "num_experts")
    count, top_k = read.integer(key, count), read.integer("num_experts_per_tok", top_k)
    if top_k > count:
        raise BadModel(f"{read.where}: a token cannot take {top_k} of {count} experts")
    return Experts(count=count, top_k=top_k, layers=layers, **more)
