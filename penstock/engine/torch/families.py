"""Model families: what a config.json means, as one flat shape. Reads no weights and imports no torch.

All families here are pre-norm decoders with rotary positions, grouped-query attention and gated SiLU MLPs. They
differ in a few facts only, so a family is a function that reads those facts out of its own spelling of the
configuration, and one decoder (decoder.py) runs them all:

    llama     attention_bias covers q, k, v and o; mlp_bias covers all three MLP layers
    mistral   no biases; `sliding_window` covers every layer (4096 where the file does not say)
    qwen2     q, k, v always have a bias, o never; `use_sliding_window` from layer `max_window_layers` on
    qwen3     per-head RMS norm of q and k before the rotation; attention_bias as llama; windows as qwen2

In three more the MLP of a layer is a mixture of experts (mlp.py), which families spell and route differently:

    mixtral     attention as mistral, without a window unless stated; expert weights sum to one
    qwen2_moe   attention as qwen2; one expert more that every token takes, through a gate of its own
    qwen3_moe   attention as qwen3, a stated window covers every layer; `norm_topk_prob` as in qwen2_moe

Qwen's `mlp_only_layers` and `decoder_sparse_step` leave a plain MLP in some layers.

Positions are read in positions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from penstock.core.errors import BadModel
from penstock.engine.torch.positions import Rope, read_rope, stretched
from penstock.engine.torch.reading import Config, Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixtures of a model: a token takes `top_k` of `count` experts of `width`.

    is_normed      the weights of a token's experts are scaled to sum to one
    layers         one entry a layer; False = a plain MLP
    shared_width   of the expert that every token takes; None = there is none
    block, gate, up, down   how the tensors are called
    """

    count: int
    top_k: int
    width: int
    is_normed: bool
    layers: tuple[bool, ...]
    shared_width: int | None = None
    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


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
    experts: Experts | None = None
    stored_dtype: str = "fp32"

    def kv_bytes_per_token(self, dtype: str) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]


DTYPE_BYTES = {"fp32": 4, "bf16": 2}
STORED = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16"}


def read_shape(config: Config, where: str) -> Shape:
    """Read a parsed config.json. `where` names the file in errors. Raises BadModel."""
    name = _architecture(config, where)
    reader = Reader(config, where)
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


def _llama(read: Reader) -> Shape:
    has_bias = read.flag("attention_bias")
    return _shape(
        read,
        "llama",
        max_context=2048,
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        has_mlp_bias=read.flag("mlp_bias"),
    )


def _mistral(read: Reader) -> Shape:
    window = read.config.get("sliding_window", 4096)
    if window is not None:
        window = read.integer("sliding_window", 4096)
    layers = read.integer("num_hidden_layers")
    return _shape(read, "mistral", max_context=131072, windows=(window,) * layers)


def _qwen2(read: Reader) -> Shape:
    return _shape(read, "qwen2", max_context=32768, windows=_late_windows(read), has_qkv_bias=True)


def _qwen3(read: Reader) -> Shape:
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


def _mixtral(read: Reader) -> Shape:
    read = read.over(rope_theta=1e6, rms_norm_eps=1e-5)
    layers = read.integer("num_hidden_layers")
    return _shape(
        read,
        "mixtral",
        max_context=131072,
        windows=_one_window(read),
        experts=_experts(
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


def _qwen2_moe(read: Reader) -> Shape:
    return _shape(
        read,
        "qwen2_moe",
        max_context=32768,
        windows=_late_windows(read),
        has_qkv_bias=read.flag("qkv_bias", True),
        experts=_experts(
            read,
            _sparse_layers(read),
            count=60,
            top_k=4,
            width=read.integer("moe_intermediate_size", 1408),
            is_normed=read.flag("norm_topk_prob"),
            shared_width=read.integer("shared_expert_intermediate_size", 5632),
        ),
    )


def _qwen3_moe(read: Reader) -> Shape:
    has_bias = read.flag("attention_bias")
    return _shape(
        read,
        "qwen3_moe",
        max_context=32768,
        windows=_one_window(read) if read.flag("use_sliding_window") else None,
        has_qkv_bias=has_bias,
        has_out_bias=has_bias,
        has_qk_norm=True,
        experts=_experts(
            read,
            _sparse_layers(read),
            count=128,
            top_k=8,
            width=read.integer("moe_intermediate_size", 768),
            is_normed=read.flag("norm_topk_prob"),
        ),
    )


def _experts(
    read: Reader, layers: tuple[bool, ...], *, count: int, top_k: int, **more: Any
) -> Experts | None:
    """None where no layer has any. `count` and `top_k` are what the family takes when the file is silent."""
    if not any(layers):
        return None
    key = "num_local_experts" if read.config.get("num_local_experts") else "num_experts"
    count, top_k = read.integer(key, count), read.integer("num_experts_per_tok", top_k)
    if top_k > count:
        raise BadModel(f"{read.where}: a token cannot take {top_k} of {count} experts")
    return Experts(count=count, top_k=top_k, layers=layers, **more)


def _sparse_layers(read: Reader) -> tuple[bool, ...]:
    """Qwen's choice of layers that have experts."""
    plain, step = read.config.get("mlp_only_layers") or [], read.integer("decoder_sparse_step", 1)
    if not isinstance(plain, list):
        raise BadModel(f"{read.where}: mlp_only_layers must be a list, got {plain!r}")
    layers = range(read.integer("num_hidden_layers"))
    return tuple(layer not in plain and (layer + 1) % step == 0 for layer in layers)


def _one_window(read: Reader) -> tuple[int | None, ...] | None:
    """The same stated window in every layer."""
    if read.config.get("sliding_window") is None:
        return None
    return (read.integer("sliding_window"),) * read.integer("num_hidden_layers")


def _late_windows(read: Reader) -> tuple[int | None, ...]:
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
    read: Reader,
    family: str,
    *,
    max_context: int,
    head_dim: int | None = None,
    windows: tuple[int | None, ...] | None = None,
    experts: Experts | None = None,
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
        experts=experts,
        stored_dtype=STORED.get(str(stored), "fp32"),
        **flags,
    )


FAMILIES: dict[str, Callable[[Reader], Shape]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
}
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
