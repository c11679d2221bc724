"""LLaDA and Dream: what their configuration files and tensor names mean, read into the decoder's own shape.

    llada   a Llama without a causal mask in the spelling of OLMo: d_model, n_heads, ...; output i is of position i
    dream   a Qwen2 without a causal mask; output i is of position i + 1, as in the causal model it was trained from

Both are run by decoder.py: attention decides what a position sees. Reads no weights and imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.errors import BadModel
from penstock.engine.torch.families import STORED, Shape, read_shape
from penstock.engine.torch.positions import read_rope
from penstock.engine.torch.reading import Config, Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvassed:
    """A model that fills canvases. `is_shifted`: output i tells position i + 1."""

    shape: Shape
    mask_id: int
    is_shifted: bool


def is_diffusion(config: Config) -> bool:
    return _family(config) is not None


def read_canvassed(config: Config, where: str) -> Canvassed:
    """Read a parsed config.json. Raises BadModel."""
    family = _family(config)
    if family is None:
        raise BadModel(
            f"{where}: this is no diffusion language model",
            hint="supported are LLaDAModelLM and DreamModel",
        )
    shape = FAMILIES[family](config, where)
    mask_id = Reader(config, where).integer("mask_token_id")
    if mask_id >= shape.vocab_size:
        raise BadModel(
            f"{where}: mask_token_id {mask_id} is outside the vocabulary of {shape.vocab_size}"
        )
    return Canvassed(shape=shape, mask_id=mask_id, is_shifted=family == "dream")


def _family(config: Config) -> str | None:
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else config.get("model_type")
    return ARCHITECTURES.get(str(name))


def _dream(config: Config, where: str) -> Shape:
    named = {**config, "architectures": ["Qwen2ForCausalLM"]}
    if config.get("use_sliding_window"):
        raise BadModel(f"{where}: a sliding window makes no sense without a causal mask")
    return dataclasses.replace(read_shape(named, where), family="dream")


def _llada(config: Config, where: str) -> Shape:
    read = Reader(config, where)
    _refuse(config, where)
    hidden, heads = read.integer("d_model"), read.integer("n_heads")
    layers = read.integer("n_layers")
    kv_heads = read.integer("n_kv_heads", heads)
    if heads % kv_heads or hidden % heads:
        raise BadModel(f"{where}: {heads} heads do not fit {kv_heads} kv heads and width {hidden}")
    context = read.integer("max_sequence_length", 4096)
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    return Shape(
        family="llada",
        vocab_size=read.integer("embedding_size", read.integer("vocab_size")),
        hidden=hidden,
        intermediate=read.integer("mlp_hidden_size", read.integer("mlp_ratio", 4) * hidden),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        norm_eps=read.number("rms_norm_eps", 1e-5),
        max_context=context,
        rope=read_rope(config, context, where),
        windows=(None,) * layers,
        is_tied=read.flag("weight_tying"),
        has_qkv_bias=read.flag("include_bias") or read.flag("include_qkv_bias"),
        has_out_bias=read.flag("include_bias"),
        has_mlp_bias=read.flag("include_bias"),
        stored_dtype=STORED.get(str(stored), "fp32"),
    )


def _refuse(config: Config, where: str) -> None:
    """Variants of the same configuration class that no published LLaDA uses."""
    wanted = {
        "block_type": "llama",
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "rope": True,
    }
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise BadModel(f"{where}: {key} {config[key]!r} is not supported (only {value!r} is)")
    for key in ("alibi", "attention_layer_norm", "input_emb_norm", "scale_logits"):
        if config.get(key):
            raise BadModel(f"{where}: {key} is not supported")


FAMILIES: dict[str, Callable[[Config, str], Shape]] = {"llada": _llada, "dream": _dream}
ARCHITECTURES = {
    "LLaDAModelLM": "llada",
    "llada": "llada",
    "DreamModel": "dream",
    "Dream": "dream",
}
