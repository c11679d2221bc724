"""Model shapes: the numbers of a transformer that decide what a step costs.

Decoders of the Llama family (Llama, Mistral, Qwen 2/3). With hidden h, q heads H, kv heads K of width d, ffn f:

    attention  h*H*d (q) + 2*h*K*d (k, v) + H*d*h (o)      mlp  3*h*f
    KV bytes a token = 2 * layers * K * d * kv_item_bytes   flops a token = 2 * (weights it passes)

Embedding look-up costs nothing; the LM head is charged only for rows that sample.

In a mixture of experts (Mixtral, Qwen 3 MoE) the mlp is a router and E experts of 3*h*f_e weights each; a token passes
k of them, so `layer_params` is what a token multiplies and `stored_layer_params` what memory holds. How many experts'
weights a step reads depends on its tokens: cost.coverage. Every layer must be one; mixed stacks are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from penstock.core.errors import BadModel

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder. `weight_item_bytes` and `kv_item_bytes`: bytes of a stored weight and of a cached number.

    `experts`, `top_k` and `expert_ffn` are None in dense models, whose mlp has width `ffn`.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_context: int
    is_tied: bool = False
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    weight_item_bytes: float = 2.0
    kv_item_bytes: float = 2.0
    experts: int | None = None
    top_k: int | None = None
    expert_ffn: int | None = None

    def __post_init__(self) -> None:
        told = (self.experts, self.top_k, self.expert_ffn)
        if None in told and told != (None, None, None):
            raise ValueError("a mixture of experts needs experts, top_k and expert_ffn")
        if self.experts is not None and not 1 <= (self.top_k or 0) <= self.experts:
            raise ValueError(f"a token takes 1 to {self.experts} experts, not {self.top_k}")

    @property
    def expert_params(self) -> int:
        """Of one expert; 0 in dense models."""
        return 3 * self.hidden * (self.expert_ffn or 0)

    @property
    def router_params(self) -> int:
        return self.hidden * (self.experts or 0)

    @property
    def attention_params(self) -> int:
        """Of one layer's four projections."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def mlp_params(self) -> int:
        """Of one layer, as many as a token passes."""
        if self.experts is None:
            return 3 * self.hidden * self.ffn
        return self.router_params + (self.top_k or 0) * self.expert_params

    @property
    def layer_params(self) -> int:
        """Matrix weights of one layer: what every token multiplies."""
        return self.attention_params + self.mlp_params

    @property
    def stored_layer_params(self) -> int:
        """All matrix weights of one layer."""
        idle = (self.experts or 0) - (self.top_k or 0)
        return self.layer_params + idle * self.expert_params

    @property
    def head_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def params(self) -> int:
        small = 2 * self.hidden  # the two norms of a layer
        small += (self.heads + 2 * self.kv_heads) * self.head_dim if self.has_qkv_bias else 0
        small += 2 * self.head_dim if self.has_qk_norm else 0
        tables = self.head_params * (1 if self.is_tied else 2)
        return self.layers * (self.stored_layer_params + small) + tables + self.hidden

    @property
    def weight_bytes(self) -> float:
        return self.params * self.weight_item_bytes

    @property
    def kv_bytes(self) -> float:
        """Of one position, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_item_bytes

    @property
    def flops_per_token(self) -> int:
        """Of one token through all layers and the LM head, attention scores not counted."""
        return 2 * (self.layers * self.layer_params + self.head_params)


def _preset(
    name: str, sizes: tuple[int, ...], moe: tuple[int, int, int] | None = None, **more: bool
) -> ModelShape:
    """`moe`: experts, how many of them a token takes, width of each."""
    hidden, layers, heads, kv_heads, head_dim, ffn, vocab, max_context = sizes
    experts, top_k, expert_ffn = moe or (None, None, None)
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocab=vocab,
        max_context=max_context,
        experts=experts,
        top_k=top_k,
        expert_ffn=expert_ffn,
        **more,
    )


PRESETS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _preset("llama-2-7b", (4096, 32, 32, 32, 128, 11008, 32000, 4096)),
        _preset("llama-2-13b", (5120, 40, 40, 40, 128, 13824, 32000, 4096)),
        _preset("llama-2-70b", (8192, 80, 64, 8, 128, 28672, 32000, 4096)),
        _preset("llama-3.1-8b", (4096, 32, 32, 8, 128, 14336, 128256, 131072)),
        _preset("llama-3.1-70b", (8192, 80, 64, 8, 128, 28672, 128256, 131072)),
        _preset("mistral-7b", (4096, 32, 32, 8, 128, 14336, 32000, 32768)),
        _preset("qwen2.5-14b", (5120, 48, 40, 8, 128, 13824, 152064, 131072), has_qkv_bias=True),
        _preset(
            "qwen3-0.6b",
            (1024, 28, 16, 8, 128, 3072, 151936, 40960),
            is_tied=True,
            has_qk_norm=True,
        ),
        _preset("qwen3-8b", (4096, 36, 32, 8, 128, 12288, 151936, 40960), has_qk_norm=True),
        _preset("qwen3-14b", (5120, 40, 40, 8, 128, 17408, 151936, 40960), has_qk_norm=True),
        _preset("qwen3-32b", (5120, 64, 64, 8, 128, 25600, 151936, 40960), has_qk_norm=True),
        _preset("mixtral-8x7b", (4096, 32, 32, 8, 128, 14336, 32000, 32768), (8, 2, 14336)),
        _preset("mixtral-8x22b", (6144, 56, 48, 8, 128, 16384, 32768, 65536), (8, 2, 16384)),
        _preset(
            "qwen3-30b-a3b",
            (2048, 48, 32, 4, 128, 6144, 151936, 40960),
            (128, 8, 768),
            has_qk_norm=True,
        ),
        _preset(
            "qwen3-235b-a22b",
            (4096, 94, 64, 4, 128, 12288, 151936, 40960),
            (128, 8, 1536),
            has_qk_norm=True,
        ),
    )
}


def shape_of(model: str) -> ModelShape:
    """The shape of a preset name, of a folder with a config.json, or of such a file."""
    found = PRESETS.get(model.lower())
    if found is not None:
        return found
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise BadModel(
            f"no model shape is known as {model!r}",
            hint=f"give a model folder with a config.json, or one of: {', '.join(sorted(PRESETS))}",
        )
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadModel(f"{file} is not valid JSON: {error}") from None
    return shape_of_config(table, name=path.name or model)


KINDS = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")


def shape_of_config(table: Mapping[str, object], name: str) -> ModelShape:
    """Read Hugging Face's config.json of a Llama, Mistral, Mixtral, Qwen 2/3, LLaDA or Dream model."""
    table = _as_written(table)
    kind = table.get("model_type")
    if kind not in KINDS:
        raise BadModel(
            f"{name}: cannot price model type {kind!r}", hint=f"known: {', '.join(KINDS)}"
        )
    size = _Sizes(table, name)
    experts, top_k, expert_ffn = _experts(kind, size)
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    told = str(table.get("torch_dtype") or table.get("dtype") or "bfloat16")
    item_bytes = float(ITEM_BYTES.get(told, 2))
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        ffn=size("intermediate_size"),
        vocab=size("vocab_size"),
        max_context=size("max_position_embeddings", 4096),
        is_tied=bool(table.get("tie_word_embeddings", False)),
        has_qkv_bias=kind == "qwen2" or bool(table.get("attention_bias", False)),
        has_qk_norm=kind in ("qwen3", "qwen3_moe"),
        weight_item_bytes=item_bytes,
        kv_item_bytes=item_bytes,
        experts=experts,
        top_k=top_k,
        expert_ffn=expert_ffn,
    )


def _as_written(table: Mapping[str, object]) -> Mapping[str, object]:
    """Diffusion language models as the models they are made like: LLaDA a Llama, Dream a Qwen 2."""
    kind = table.get("model_type")
    if kind == "Dream":
        return {**table, "model_type": "qwen2"}
    if kind != "llada":
        return table
    named = {theirs: table[ours] for theirs, ours in LLADA_KEYS.items() if table.get(ours)}
    return {**named, "model_type": "llama", "torch_dtype": table.get("torch_dtype")}


LLADA_KEYS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "mlp_hidden_size",
    "vocab_size": "embedding_size",
    "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "weight_tying",
}


class _Sizes:
    """The positive integers of a config.json. Raises BadModel that names the key."""

    def __init__(self, table: Mapping[str, object], name: str) -> None:
        self.table, self.name = table, name

    def __call__(self, key: str, default: int | None = None) -> int:
        value = self.table.get(key, default)
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise BadModel(
                f"{self.name}: config.json has {key} = {value!r}, a positive integer is needed"
            )
        return value


def _experts(kind: object, size: _Sizes) -> tuple[int | None, int | None, int | None]:
    """(experts, top k, width of each). Raises BadModel where only some layers have experts."""
    table = size.table
    if kind == "mixtral":
        width = size("intermediate_size")
        return size("num_local_experts"), size("num_experts_per_tok"), width
    if kind == "qwen3_moe":
        if table.get("mlp_only_layers") or size("decoder_sparse_step", 1) != 1:
            raise BadModel(f"{size.name}: layers with and without experts cannot be priced yet")
        width = size("moe_intermediate_size")
        name = "num_experts" if table.get("num_experts") else "num_local_experts"
        return size(name), size("num_experts_per_tok"), width
    if any(table.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise BadModel(f"{size.name}: experts in a model of type {kind!r} cannot be priced yet")
    return None, None, None
