"""GGUF files of the small models, written with the `gguf` package as llama.cpp's converter lays them out."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
}
TURNED = ("llama", "mixtral", "granite", "smollm3")


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: Kind | Mapping[str, Kind] = Kind.F32,
    *,
    tokens: Sequence[str] | None = None,
    more: Mapping[str, object] | None = None,
    split: int | None = None,
) -> PreTrainedModel:
    """Returns the model that the file means. `kind` may name patterns of tensors; `split`: tensors a file."""
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    limits = {} if split is None else {"split_max_tensors": split}
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], **limits)
    _sizes(writer, config)
    _vocabulary(writer, tokens or [f"t{at}" for at in range(config.vocab_size)])
    for key, value in (more or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, int(str(value)))
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    meant = copy.deepcopy(model)
    with torch.no_grad():
        corrections = [pair for pair in meant.named_buffers() if "e_score_correction" in pair[0]]
        for name, value in [*meant.named_parameters(), *corrections]:
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            for stored, part in _parts(config, name, value):
                asked = stored.replace("e_score_correction_bias", "e_score_correction.bias")
                target = names.get_name(asked, try_suffixes=(".weight", ".bias"))
                assert target is not None, stored
                _add(writer, target, part, _kind_of(kind, target, part))
                value.copy_(_put_back(config, name, value, stored, part))
    for name, factors in _factors(config):
        writer.add_tensor(name, np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant.eval()


def _kind_of(kind: Kind | Mapping[str, Kind], target: str, value: Tensor) -> Kind:
    if value.dim() < 2 or "gate_inp" in target:
        return Kind.F32
    if isinstance(kind, Mapping):
        return next((one for part, one in kind.items() if re.search(part, target)), Kind.F32)
    return kind


def _add(writer: gguf.GGUFWriter, name: str, value: Tensor, kind: Kind) -> None:
    """And leaves in `value` what was stored."""
    plain = value.float().contiguous().numpy()
    if kind == Kind.F32:
        writer.add_tensor(name, plain.copy())
        return
    data = gguf.quants.quantize(plain, kind)
    writer.add_tensor(name, data, raw_dtype=kind)
    value.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind).copy()).view_as(value))


def _parts(config, name: str, value: Tensor) -> list[tuple[str, Tensor]]:  # type: ignore[no-untyped-def]
    """The tensors that the converter makes of one parameter, under the names that it looks up."""
    kind, rows = config.model_type, value.detach().clone()
    if ".experts.gate_up_proj" in name:
        gate, up = rows.chunk(2, 1)
        at = name.removesuffix("gate_up_proj")
        return [(f"{at}gate_proj.weight", gate.clone()), (f"{at}up_proj.weight", up.clone())]
    if ".experts.down_proj" in name:
        return [(f"{name}.weight", rows)]
    if kind in TURNED and re.search(r"[qk]_proj\.", name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = rows.view(heads, 2, -1, *rows.shape[1:])
        return [(name, halves.transpose(1, 2).reshape(rows.shape).clone())]
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return [(name, rows + 1)]
    if "kv_b_proj" in name:
        heads = rows.view(config.num_attention_heads, -1, rows.shape[-1])
        key, value_ = heads.split([config.qk_nope_head_dim, config.v_head_dim], 1)
        key_name, value_name = (name.replace("kv_b", one) for one in ("k_b", "v_b"))
        return [(key_name, key.transpose(1, 2).contiguous()), (value_name, value_.contiguous())]
    return [(name, rows)]


def _put_back(config, name: str, value: Tensor, stored: str, part: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """The parameter once this part of it is what the file holds."""
    value = value.detach().clone()
    if ".experts.gate_up_proj" in name:
        half = value.shape[1] // 2
        (value[:, half:] if stored.endswith("up_proj.weight") else value[:, :half]).copy_(part)
        return value
    if config.model_type in TURNED and re.search(r"[qk]_proj\.", name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return part.view(heads, -1, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return value
    if "kv_b_proj" in name:
        heads = value.view(config.num_attention_heads, -1, value.shape[-1])
        plain = config.qk_nope_head_dim
        if "k_b_proj" in stored:
            heads[:, :plain] = part.transpose(1, 2)
        else:
            heads[:, plain:] = part
        return value
    return part.view_as(value)


def _sizes(writer: gguf.GGUFWriter, config) -> None:  # type: ignore[no-untyped-def]
    kind = config.model_type
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    whole = rope.get("full_attention", rope)
    writer.add_rope_freq_base(whole["rope_theta"])
    if kind.startswith("deepseek"):
        _deepseek(writer, config, rope)
    else:
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(int(head_dim * whole.get("partial_rotary_factor", 1.0)))
    if kind.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
        if kind == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if kind == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if whole.get("rope_type") in ("linear", "yarn"):
        scaling = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
        writer.add_rope_scaling_type(scaling[whole["rope_type"]])
        writer.add_rope_scaling_factor(whole["factor"])
        if whole["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(whole["original_max_position_embeddings"])
    if "moe" in kind or kind == "mixtral":
        writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if kind != "mixtral":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _deepseek(writer: gguf.GGUFWriter, config, rope) -> None:  # type: ignore[no-untyped-def]
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.model_type == "deepseek_v3":
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config.n_group:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if rope.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _factors(config) -> list[tuple[str, Sequence[float]]]:  # type: ignore[no-untyped-def]
    """Factors of frequencies: Llama 3's, by transformers' own table; Phi-3's, as they are."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return [
            ("rope_factors_long.weight", rope["long_factor"]),
            ("rope_factors_short.weight", rope["short_factor"]),
        ]
    if rope.get("rope_type") != "llama3":
        return []
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    dims = 2 * len(scaled)
    plain = 1 / rope["rope_theta"] ** (torch.arange(0, dims, 2) / dims)
    return [("rope_freqs.weight", (plain / scaled).tolist())]


def _vocabulary(writer: gguf.GGUFWriter, tokens: Sequence[str]) -> None:
    """A byte-level one of no merges, for models that are only asked for logits."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(tokens))
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def vocabulary_file(
    path: Path,
    tokens: Sequence[str],
    *,
    kinds: Sequence[int],
    scores: Sequence[float] | None = None,
    merges: Sequence[str] | None = None,
    told: Mapping[str, object],
) -> None:
    """A file of one small tensor, for the sake of its tokenizer."""
    writer = gguf.GGUFWriter(path, str(told.get("architecture", "llama")))
    writer.add_tokenizer_model(str(told["model"]))
    writer.add_tokenizer_pre(str(told.get("pre", "default")))
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(kinds))
    if scores is not None:
        writer.add_token_scores(list(scores))
    if merges is not None:
        writer.add_token_merges(list(merges))
    for key, value in told.items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
    if "template" in told:
        writer.add_chat_template(str(told["template"]))
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def spelled(tokenizer: Tokenizer) -> list[str]:
    """Its tokens in order."""
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=lambda token: vocab[token])
