"""Shapes from Hugging Face's config.json: every family that the engine runs, and the diffusion models made like them.

Only sizes are read here; whether an engine can run the model is found out when it is opened. Files leave out what
equals the default of their class: DEFAULTS has those that matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.core.errors import BadModel
from penstock.cost.encoder_files import BERTS, ENCODERS, as_decoder, small_params
from penstock.cost.model_shape import LatentShape, ModelShape

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
GEMMA: dict[str, object] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
DEFAULTS: dict[str, dict[str, object]] = {
    "gemma2": {**GEMMA, "vocab_size": 256000, "max_position_embeddings": 8192},
    "gemma3_text": {**GEMMA, "vocab_size": 262208, "max_position_embeddings": 131072},
    "deepseek_v2": {
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
    },
    "deepseek_v3": {
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3,
    },
    "smollm3": {"max_position_embeddings": 32768, "tie_word_embeddings": True},
    "qwen2_moe": {
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    },
    "mistral": {"sliding_window": 4096},
    "phi": {"max_position_embeddings": 2048},
}
KINDS = (
    "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3", "gemma3_text",
    "phi", "phi3", "deepseek_v2", "deepseek_v3", "smollm3", "granite", "olmo2",
    "smallthinker", *ENCODERS,
)  # fmt: skip
DEEPSEEK = ("deepseek_v2", "deepseek_v3")
LLAMAS = ("llama", "smollm3", "granite", "olmo2")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "smallthinker", *DEEPSEEK)
EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
FEW_NORMS = ("qwen3", "qwen3_moe", "gemma3_text")  # with norms of queries and keys


def shape_of_config(table: Mapping[str, object], name: str) -> ModelShape:
    """The shape that a parsed config.json describes. Raises BadModel that names the key."""
    table = _as_written(table)
    kind = str(table.get("model_type"))
    if kind not in KINDS:
        raise BadModel(
            f"{name}: cannot price model type {table.get('model_type')!r}",
            hint=f"known: {', '.join(KINDS)}",
        )
    size = Sizes({**DEFAULTS.get(kind, {}), **table}, name)
    told = str(table.get("torch_dtype") or table.get("dtype") or "bfloat16")
    item_bytes = float(ITEM_BYTES.get(told, 2))
    latent, experts = _latent(size) if kind in DEEPSEEK else None, _experts(kind, size)
    has_bias = size.flag("attention_bias")
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=1 if latent else size("num_key_value_heads", heads),
        head_dim=latent.plain + latent.rotated if latent else size("head_dim", hidden // heads),
        ffn=size("intermediate_size"),
        vocab=size("vocab_size"),
        max_context=size("max_position_embeddings", 4096),
        is_tied=size.flag("tie_word_embeddings"),
        has_qkv_bias=has_bias or kind in ("qwen2", "phi", *BERTS) or size.flag("qkv_bias"),
        has_qk_norm=kind in FEW_NORMS,
        weight_item_bytes=item_bytes,
        kv_item_bytes=item_bytes,
        mlp_matrices=2 if kind in ("phi", *BERTS) else 3,
        latent=latent,
        small_params=_small_params(kind, size, latent),
        **experts,
        **_windows(kind, size),
    )


def _as_written(table: Mapping[str, object]) -> Mapping[str, object]:
    """Diffusion models as what they are made like: LLaDA a Llama, Dream a Qwen 2. Of Gemma 3 the text model."""
    kind = table.get("model_type")
    if kind in ENCODERS:
        return as_decoder(table)
    if kind == "smallthinker":
        return {
            **THINKER,
            **table,
            **{ours: table[key] for ours, key in THINKER_KEYS if key in table},
        }
    if kind == "kimi_k2":
        return {**table, "model_type": "deepseek_v3"}
    if kind == "Dream":
        return {**table, "model_type": "qwen2"}
    if kind == "gemma3":
        text = table.get("text_config")
        told = {key: table[key] for key in ("torch_dtype", "dtype") if key in table}
        return {**told, **(text if isinstance(text, Mapping) else {}), "model_type": "gemma3_text"}
    if kind != "llada":
        return table
    named = {theirs: table[ours] for theirs, ours in LLADA_KEYS.items() if table.get(ours)}
    return {**named, "model_type": "llama", "torch_dtype": table.get("torch_dtype")}


THINKER: dict[str, object] = {
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 768,
    "intermediate_size": 768,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}
THINKER_KEYS = (
    ("num_experts", "moe_num_primary_experts"),
    ("num_experts_per_tok", "moe_num_active_primary_experts"),
    ("moe_intermediate_size", "moe_ffn_hidden_size"),
    ("intermediate_size", "moe_ffn_hidden_size"),
    ("sliding_window", "sliding_window_size"),
)
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


class Sizes:
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

    def flag(self, key: str) -> bool:
        return bool(self.table.get(key, False))

    def count(self, key: str) -> int:
        """As `()`, but nothing and null are 0."""
        return self(key) if self.table.get(key) else 0


def _latent(size: Sizes) -> LatentShape:
    return LatentShape(
        rank=size("kv_lora_rank"),
        rotated=size("qk_rope_head_dim"),
        plain=size("qk_nope_head_dim"),
        value=size("v_head_dim"),
        query_rank=size.count("q_lora_rank") or None,
    )


def _experts(kind: str, size: Sizes) -> dict[str, Any]:
    """The fields of a mixture; none in a dense model."""
    key = next((key for key in EXPERTS if size.table.get(key)), None)
    if key is None:
        return {}
    if kind not in MIXTURES:
        raise BadModel(f"{size.name}: experts in a model of type {kind!r} cannot be priced yet")
    mixed, layers = len(_sparse_layers(kind, size)), size("num_hidden_layers")
    width = size("intermediate_size" if kind == "mixtral" else "moe_intermediate_size")
    if not mixed:
        return {}
    shared = size.count("shared_expert_intermediate_size") or width * size.count("n_shared_experts")
    return {
        "experts": size(key),
        "top_k": size("num_experts_per_tok"),
        "expert_ffn": width,
        "expert_layers": None if mixed == layers else mixed,
        "shared_ffn": shared or None,
    }


def _sparse_layers(kind: str, size: Sizes) -> list[int]:
    """Layers that have experts."""
    layers = range(size("num_hidden_layers"))
    if kind in DEEPSEEK:
        return [layer for layer in layers if layer >= size.count("first_k_dense_replace")]
    plain, step = size.table.get("mlp_only_layers") or [], size("decoder_sparse_step", 1)
    if not isinstance(plain, list):
        raise BadModel(f"{size.name}: mlp_only_layers must be a list, got {plain!r}")
    return [layer for layer in layers if layer not in plain and (layer + 1) % step == 0]


def _windows(kind: str, size: Sizes) -> dict[str, Any]:
    """The fields of windows; none where no layer has one."""
    table, layers = size.table, size("num_hidden_layers")
    is_optional = kind.startswith("qwen")
    if table.get("sliding_window") is None or (is_optional and not size.flag("use_sliding_window")):
        return {}
    count, kinds = layers, table.get("layer_types")
    if isinstance(kinds, list) and kind not in ("mistral", "mixtral", "phi3", "qwen3_moe"):
        count = kinds.count("sliding_attention")
    elif kind in ("qwen2", "qwen3", "qwen2_moe"):
        count = max(
            0, layers - (size.count("max_window_layers") if "max_window_layers" in table else 28)
        )
    elif kind == "smallthinker":
        layout = table.get("sliding_window_layout")
        count = sum(map(bool, layout)) if isinstance(layout, list) else 0
    elif kind in ("gemma2", "gemma3_text"):
        every = 2 if kind == "gemma2" else size("sliding_window_pattern", 6)
        count = layers - layers // every
    return {"window": size("sliding_window"), "window_layers": count} if count else {}


def _small_params(kind: str, size: Sizes, latent: LatentShape | None) -> int:
    """Norms beyond the two of a layer, and biases beyond those of queries, keys and values."""
    hidden, layers, ffn = size("hidden_size"), size("num_hidden_layers"), size("intermediate_size")
    small = 0
    if kind in ENCODERS:
        return small_params(kind, size.table)
    if kind in ("gemma2", "gemma3_text"):
        small += 2 * hidden
    if kind == "phi":  # one norm with a bias is as large as two without
        small += 2 * hidden + ffn
        return layers * small + hidden + size("vocab_size")
    if kind in (*LLAMAS, "qwen3", "qwen3_moe", "gemma2", "gemma3_text"):
        small += hidden if size.flag("attention_bias") else 0
    if kind in LLAMAS and size.flag("mlp_bias"):
        small += 2 * ffn + hidden
    if kind == "olmo2":  # norms over all heads of queries, and of keys
        heads = size("num_attention_heads")
        small += hidden + hidden // heads * size("num_key_value_heads", heads)
    if latent is not None:
        small += latent.rank + (latent.query_rank or 0)
    gates = len(_sparse_layers(kind, size)) if kind == "qwen2_moe" else 0
    return layers * small + gates * hidden
