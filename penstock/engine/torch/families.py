"""Model families: what a config.json means, as one flat shape. Reads no weights and imports no torch.

All families here are pre-norm decoders with rotary positions, grouped-query attention and a gated SiLU MLP. They
differ in a few facts only, so a family is a function that reads those facts out of its own spelling of the
configuration, and one decoder (decoder.py) runs them all:

    llama     attention_bias covers q, k, v and o; mlp_bias covers all three MLP layers
    mistral   no biases; `sliding_window` covers every layer (4096 where the file does not say)
    qwen2     q, k, v always have a bias, o never; `use_sliding_window` from layer `max_window_layers` on
    qwen3     per-head RMS norm of q and k before the rotation; attention_bias as llama; windows as qwen2

Positions come in two spellings: `rope_theta` + `rope_scaling` (older) and `rope_parameters` (transformers 5). Kinds
that rescale with the length of the text in hand (dynamic, longrope) are refused: a cached key would have to be
rotated again whenever its text grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from penstock.core.errors import BadModel

Config = Mapping[str, object]
RopeKind = Literal["default", "linear", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions. Fields beyond `theta` are read by the kinds that need them."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Everything about a model but its weights. `windows` has one entry a layer; None = sees all positions."""

    family: str
    vocab_size: int
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_context: int
    rope: Rope
    windows: tuple[int | None, ...]
    is_tied: bool = False
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    stored_dtype: str = "fp32"

    def kv_bytes_per_token(self, dtype: str) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]


DTYPE_BYTES = {"fp32": 4, "bf16": 2}
STORED = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16"}


def read_shape(config: Config, where: str) -> Shape:
    """Read a parsed config.json. `where` names the file in errors. Raises BadModel."""
    name = _architecture(config, where)
    reader = _Reader(config, where)
    if "quantization_config" in config:
        raise BadModel(
            f"{where}: the weights are quantised, which this engine cannot read",
            hint="use the unquantised checkpoint of the same model (bf16, fp16 or fp32 safetensors)",
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise BadModel(f"{where}: hidden_act {activation!r} is not supported (only 'silu' is)")
    return FAMILIES[name](reader)


def _architecture(config: Config, where: str) -> str:
    known = ", ".join(sorted(ARCHITECTURES))
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else None
    if name is None and config.get("model_type") in FAMILIES:
        return str(config["model_type"])
    family = ARCHITECTURES.get(str(name))
    if family is None:
        told = f"architecture {name!r}" if name else f"model_type {config.get('model_type')!r}"
        raise BadModel(f"{where}: {told} is not supported", hint=f"supported are {known}")
    return family


class _Reader:
    """Typed access to a config, with errors that name the file and the key."""

    def __init__(self, config: Config, where: str) -> None:
        self.config, self.where = config, where

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadModel(f"{self.where}: {key} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        return number(self.config, key, default, self.where)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.config.get(key)
        return default if value is None else bool(value)


def number(table: Config, key: str, default: float | None, where: str) -> float:
    value = table.get(key)
    if value is None:
        value = default
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise BadModel(f"{where}: {key} must be a number, got {value!r}")
    return float(value)


def _llama(read: _Reader) -> Shape:
    has_bias = read.flag("attention_bias")
    return _shape(
        read,
        "llama",
        max_context=2048,
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        has_mlp_bias=read.flag("mlp_bias"),
    )


def _mistral(read: _Reader) -> Shape:
    window = read.config.get("sliding_window", 4096)
    if window is not None:
        window = read.integer("sliding_window", 4096)
    layers = read.integer("num_hidden_layers")
    return _shape(read, "mistral", max_context=131072, windows=(window,) * layers)


def _qwen2(read: _Reader) -> Shape:
    return _shape(read, "qwen2", max_context=32768, windows=_late_windows(read), has_qkv_bias=True)


def _qwen3(read: _Reader) -> Shape:
    has_bias = read.flag("attention_bias")
    return _shape(
        read,
        "qwen3",
        max_context=32768,
        head_dim=128,
        windows=_late_windows(read),
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        has_qk_norm=True,
    )


def _late_windows(read: _Reader) -> tuple[int | None, ...]:
    """Qwen's windows: `layer_types` where given, else from `max_window_layers` on, and only if switched on."""
    layers = read.integer("num_hidden_layers")
    if not read.flag("use_sliding_window"):
        return (None,) * layers
    window = read.integer("sliding_window", 4096)
    kinds = read.config.get("layer_types")
    if isinstance(kinds, list):
        if len(kinds) != layers:
            raise BadModel(f"{read.where}: layer_types lists {len(kinds)} of {layers} layers")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = read.config.get("max_window_layers", 28)
    if not isinstance(first, int) or first < 0:
        raise BadModel(f"{read.where}: max_window_layers must be an integer, got {first!r}")
    return tuple(window if layer >= first else None for layer in range(layers))


def _shape(
    read: _Reader,
    family: str,
    *,
    max_context: int,
    head_dim: int | None = None,
    windows: tuple[int | None, ...] | None = None,
    **flags: bool,
) -> Shape:
    hidden = read.integer("hidden_size")
    heads = read.integer("num_attention_heads")
    layers = read.integer("num_hidden_layers")
    kv_heads = read.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise BadModel(
            f"{read.where}: {heads} attention heads do not divide over {kv_heads} key/value heads"
        )
    told_context = read.integer("max_position_embeddings", max_context)
    rope = read_rope(read.config, told_context, read.where)
    stored = read.config.get("dtype") or read.config.get("torch_dtype") or "float32"
    return Shape(
        family=family,
        vocab_size=read.integer("vocab_size"),
        hidden=hidden,
        intermediate=read.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=read.integer("head_dim", head_dim or hidden // heads),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        max_context=stretched(told_context, rope),
        rope=rope,
        windows=windows or (None,) * layers,
        is_tied=read.flag("tie_word_embeddings"),
        stored_dtype=STORED.get(str(stored), "fp32"),
        **flags,
    )


def stretched(told: int, rope: Rope) -> int:
    """The context a scaled model reaches: linear and yarn state the unscaled one."""
    if rope.kind == "linear":
        return int(told * rope.factor)
    if rope.kind == "yarn":
        return max(told, int(rope.original_context * rope.factor))
    return told


def read_rope(config: Config, max_context: int, where: str) -> Rope:
    """Both spellings of rotary positions. Raises BadModel for the kinds that are not supported."""
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        raise BadModel(f"{where}: rope_parameters must be a table, got {table!r}")
    theta = number({**config, **table}, "rope_theta", 10000.0, where)
    kind = table.get("rope_type") or table.get("type") or "default"
    partial = number({**config, **table}, "partial_rotary_factor", 1.0, where)
    if kind not in ROPE_KINDS or partial != 1.0:
        told = f"rope type {kind!r}" if partial == 1.0 else f"partial_rotary_factor {partial}"
        raise BadModel(
            f"{where}: {told} is not supported", hint=f"supported are {', '.join(ROPE_KINDS)}"
        )
    if kind == "default":
        return Rope(theta=theta)
    original = number(table, "original_max_position_embeddings", max_context, where)
    factor = table.get("factor")
    if factor is None and kind == "yarn":
        factor = max_context / original
    scale = number({"factor": factor}, "factor", None, where)
    return Rope(
        kind=kind,
        theta=theta,
        factor=scale,
        original_context=int(original),
        low_freq_factor=number(table, "low_freq_factor", 1.0, where),
        high_freq_factor=number(table, "high_freq_factor", 4.0, where),
        beta_fast=number(table, "beta_fast", 32.0, where),
        beta_slow=number(table, "beta_slow", 1.0, where),
        truncate=bool(table.get("truncate", True)),
        attention_factor=_yarn_attention(table, scale, where) if kind == "yarn" else 1.0,
    )


def _yarn_attention(table: Config, factor: float, where: str) -> float:
    """YaRN's temperature: 0.1 ln(factor) + 1 unless the file says otherwise."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if table.get("attention_factor") is not None:
        return number(table, "attention_factor", None, where)
    if table.get("mscale") and table.get("mscale_all_dim"):
        over = mscale(number(table, "mscale_all_dim", None, where))
        return mscale(number(table, "mscale", None, where)) / over
    return mscale(1.0)


FAMILIES: dict[str, Callable[[_Reader], Shape]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
