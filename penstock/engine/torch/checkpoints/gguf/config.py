"""A GGUF file's metadata as the config.json that the same model has on a hub. Imports no torch.

Sizes that tensors show are taken from the tensors: whether there are biases, whether the head is tied, how large the
vocabulary is, which layers have experts. Llama 3's scaled positions are stored as one factor for each frequency, which
is what LongRoPE is, with a temperature of one and the same factors for all lengths.

What the format does not state, and llama.cpp knows by heart, is known here too: how scores of the largest Gemmas are
scaled, and which layers of Gemma have windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from penstock.core.errors import BadModel
from penstock.engine.torch import families
from penstock.engine.torch.checkpoints.gguf.format import Header

Table = dict[str, object]
Named = tuple[str, Table]  # the class, and what only its family has
SCALED_BY_HEADS = {
    "gemma2": 46,
    "gemma3": 62,
}  # layers of the models whose scores are scaled by hidden / heads
PATTERNS = {"gemma2": 2, "gemma3": 6}
SIGMOID = 2  # how experts are chosen


class Told:
    """Typed access to metadata: `number("x")` reads `<architecture>.x`. Raises BadModel that names file and key."""

    def __init__(self, header: Header, where: Path) -> None:
        self.header, self.where = header, where
        self.architecture = str(header.metadata.get("general.architecture"))

    def get(self, key: str) -> object:
        return self.header.metadata.get(f"{self.architecture}.{key}")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, list):  # one for each layer
            value = value[0] if len(set(value)) == 1 else f"different in each layer: {value}"
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise BadModel(f"{self.where}: {self.architecture}.{key} is {value}, not a number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self.number(key, default))

    def has(self, *names: str) -> bool:
        return any(name in self.header.tensors for name in names)

    def shape(self, name: str) -> tuple[int, ...]:
        placed = self.header.tensors.get(name)
        if placed is None:
            raise BadModel(f"{self.where} has no tensor {name!r}", hint="fetch the file again")
        return placed.shape


def read_config(header: Header, factors: Callable[[str], Sequence[float]], where: Path) -> Table:
    """`factors` reads a tensor of fp32 numbers. Raises BadModel."""
    told = Told(header, where)
    read = ARCHITECTURES.get(told.architecture)
    if read is None:
        raise BadModel(
            f"{where}: architecture {told.architecture!r} is not supported",
            hint=f"of GGUF files, {', '.join(sorted(ARCHITECTURES))} are read",
        )
    name, own = read(told)
    table = {**_shared(told), **_rope(told, factors), **own}
    return {**table, "architectures": [name], "model_type": families.ARCHITECTURES[name]}


def _shared(told: Told) -> Table:
    heads, hidden = told.integer("attention.head_count"), told.integer("embedding_length")
    width = told.integer("expert_feed_forward_length", 0) or None
    return {
        "vocab_size": told.shape("token_embd.weight")[0],
        "hidden_size": hidden,
        "intermediate_size": told.integer("feed_forward_length", width),
        "num_hidden_layers": told.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": told.integer("attention.head_count_kv", heads),
        "head_dim": told.integer("attention.key_length", hidden // heads),
        "max_position_embeddings": told.integer("context_length"),
        "rms_norm_eps": told.number("attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": not told.has("output.weight"),
        "dtype": "bfloat16",
    }


def _rope(told: Told, factors: Callable[[str], Sequence[float]]) -> Table:
    """Positions, in the older spelling."""
    table: Table = {"rope_theta": told.number("rope.freq_base", 10000.0)}
    context = told.integer("context_length")
    original = told.integer("rope.scaling.original_context_length", context)
    kind = told.get("rope.scaling.type")
    if told.has("rope_freqs.weight"):
        same = factors("rope_freqs.weight")
        table["rope_scaling"] = _long(same, same, 1.0, context)
    elif told.has("rope_factors_long.weight"):
        short, long = factors("rope_factors_short.weight"), factors("rope_factors_long.weight")
        scale = told.number("rope.scaling.attn_factor", 1.0)
        table["rope_scaling"] = _long(short, long, scale, original)
    elif kind == "yarn":
        table["rope_scaling"] = _yarn(told, original)
    elif kind == "linear":
        table["rope_scaling"] = {"type": "linear", "factor": told.number("rope.scaling.factor")}
    elif kind not in (None, "none"):
        raise BadModel(f"{told.where}: positions scaled by {kind!r} are not supported")
    return table


def _long(short: Sequence[float], long: Sequence[float], scale: float, original: int) -> Table:
    return {
        "rope_type": "longrope",
        "short_factor": list(short),
        "long_factor": list(long),
        "attention_factor": scale,
        "factor": 1.0,
        "original_max_position_embeddings": original,
    }


def _yarn(told: Told, original: int) -> Table:
    table: Table = {
        "rope_type": "yarn",
        "factor": told.number("rope.scaling.factor"),
        "original_max_position_embeddings": original,
    }
    for key, ours in (
        ("yarn_attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if told.get(f"rope.scaling.{key}") is not None:
            table[ours] = told.number(f"rope.scaling.{key}")
    if told.get("rope.scaling.yarn_log_multiplier") is not None:  # DeepSeek's, a tenth of it
        all_dims = 10 * told.number("rope.scaling.yarn_log_multiplier")
        table |= {"mscale": all_dims, "mscale_all_dim": all_dims}
    return table


def _llama(told: Told) -> Named:
    table: Table = {"head_dim": _turned_heads(told)}
    if told.integer("expert_count", 0):
        return "MixtralForCausalLM", {
            **table,
            "num_local_experts": told.integer("expert_count"),
            "num_experts_per_tok": told.integer("expert_used_count"),
            "sliding_window": None,
        }
    has_bias = told.has("blk.0.attn_q.bias")
    if has_bias != told.has("blk.0.attn_output.bias"):
        raise BadModel(f"{told.where}: a Llama with a bias in only some of its attention layers")
    table |= {"attention_bias": has_bias, "mlp_bias": told.has("blk.0.ffn_down.bias")}
    return "LlamaForCausalLM", table


def _turned_heads(told: Told) -> int:
    """Older files state the width of heads only as that of what turns."""
    hidden, heads = told.integer("embedding_length"), told.integer("attention.head_count")
    turned = told.integer("rope.dimension_count", hidden // heads)
    width = told.integer("attention.key_length", turned)
    if turned != width:
        raise BadModel(f"{told.where}: heads of {width} of which {turned} turn are not supported")
    return width


def _qwen2(told: Told) -> Named:
    return "Qwen2ForCausalLM", {}


def _qwen3(told: Told) -> Named:
    return "Qwen3ForCausalLM", {}


def _qwen2_moe(told: Told) -> Named:
    return "Qwen2MoeForCausalLM", {
        **_experts(told),
        "norm_topk_prob": False,
        "qkv_bias": told.has("blk.0.attn_q.bias"),
        "shared_expert_intermediate_size": told.shape(_first(told, "ffn_up_shexp"))[0],
    }


def _qwen3_moe(told: Told) -> Named:
    return "Qwen3MoeForCausalLM", {**_experts(told), "norm_topk_prob": True}


def _experts(told: Told) -> Table:
    layers = range(told.integer("block_count"))
    return {
        "num_experts": told.integer("expert_count"),
        "num_experts_per_tok": told.integer("expert_used_count"),
        "moe_intermediate_size": told.shape(_first(told, "ffn_up_exps"))[1],
        "mlp_only_layers": [at for at in layers if not told.has(f"blk.{at}.ffn_up_exps.weight")],
    }


def _first(told: Told, part: str) -> str:
    """The tensor of that name in the first layer that has one."""
    names = (f"blk.{at}.{part}.weight" for at in range(told.integer("block_count")))
    return next((name for name in names if told.has(name)), f"blk.0.{part}.weight")


def _gemma(told: Told) -> Table:
    layers, heads = told.integer("block_count"), told.integer("attention.head_count")
    width = told.integer("attention.key_length", 256)
    if layers == SCALED_BY_HEADS[told.architecture]:
        width = told.integer("embedding_length") // heads
    pattern = told.get("attention.sliding_window_pattern")
    return {
        "query_pre_attn_scalar": width,
        "sliding_window": told.integer("attention.sliding_window", 4096),
        "layer_types": _windows(pattern, PATTERNS[told.architecture], layers),
        "final_logit_softcapping": told.get("final_logit_softcapping"),
    }


def _windows(told: object, usual: int, layers: int) -> list[str]:
    """All layers but every n-th, unless the file lists them."""
    if isinstance(told, list):
        are_local = [bool(one) for one in told]
    else:
        period = told if isinstance(told, int) and not isinstance(told, bool) else usual
        are_local = [(at + 1) % period != 0 for at in range(layers)]
    return ["sliding_attention" if is_local else "full_attention" for is_local in are_local]


def _gemma2(told: Told) -> Named:
    return "Gemma2ForCausalLM", {
        **_gemma(told),
        "attn_logit_softcapping": told.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": told.number("final_logit_softcapping", 30.0),
    }


def _gemma3(told: Told) -> Named:
    return "Gemma3ForCausalLM", {
        **_gemma(told),
        "rope_theta": told.number("rope.freq_base", 1e6),
        "rope_local_base_freq": told.number("rope.freq_base_swa", 1e4),
    }


def _phi3(told: Told) -> Named:
    heads, hidden = told.integer("attention.head_count"), told.integer("embedding_length")
    turned = told.integer("rope.dimension_count", hidden // heads)
    return "Phi3ForCausalLM", {
        "partial_rotary_factor": turned / (hidden // heads),
        "sliding_window": told.integer("attention.sliding_window", 0) or None,
    }


def _smollm3(told: Told) -> Named:
    return "SmolLM3ForCausalLM", {"head_dim": _turned_heads(told), "no_rope_layer_interval": 4}


def _granite(told: Told) -> Named:
    return "GraniteForCausalLM", {
        "head_dim": _turned_heads(told),
        "embedding_multiplier": told.number("embedding_scale", 1.0),
        "attention_multiplier": told.number("attention.scale", 1.0),
        "residual_multiplier": told.number("residual_scale", 1.0),
        "logits_scaling": told.number("logit_scale", 1.0),
    }


def _olmo2(told: Told) -> Named:
    if told.get("attention.sliding_window") is not None:
        raise BadModel(f"{told.where}: OLMo with windows (OLMo 3) is not supported")
    return "Olmo2ForCausalLM", {}


def _deepseek2(told: Told) -> Named:
    turned = told.integer("rope.dimension_count")
    width = told.integer("attention.key_length_mla", told.integer("attention.key_length"))
    table: Table = {
        "kv_lora_rank": told.integer("attention.kv_lora_rank"),
        "q_lora_rank": told.integer("attention.q_lora_rank", 0) or None,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": width - turned,
        "v_head_dim": told.integer(
            "attention.value_length_mla", told.integer("attention.value_length")
        ),
        "head_dim": turned,
        "first_k_dense_replace": told.integer("leading_dense_block_count", 0),
        "n_routed_experts": told.integer("expert_count"),
        "n_shared_experts": told.integer("expert_shared_count", 0),
        "num_experts_per_tok": told.integer("expert_used_count"),
        "moe_intermediate_size": told.integer("expert_feed_forward_length"),
        "routed_scaling_factor": told.number("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": bool(told.get("expert_weights_norm")),
    }
    is_v3 = told.integer("expert_gating_func", 1) == SIGMOID
    groups = told.integer("expert_group_count", 8 if is_v3 and _is_as_v3(told) else 1)
    kept = told.integer("expert_group_used_count", 4 if groups > 1 else 1)
    if groups > 1 or is_v3:
        method = "noaux_tc" if is_v3 else "group_limited_greedy"
        table |= {"topk_method": method, "n_group": groups, "topk_group": kept}
    return "DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM", table


def _is_as_v3(told: Told) -> bool:
    """Files of the first months do not state the groups of DeepSeek-V3's experts."""
    return told.integer("expert_count") == 256


ARCHITECTURES: Mapping[str, Callable[[Told], Named]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "deepseek2": _deepseek2,
    "smollm3": _smollm3,
    "granite": _granite,
    "olmo2": _olmo2,
}
