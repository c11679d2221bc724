"""Hugging Face's names of tensors, and where a GGUF file has them. Imports no torch.

A file has the experts of a layer in one tensor, fuses what Phi-3 fuses, and may have DeepSeek's keys and values apart.
Queries and keys of Llama and its kin lie in the order in which neighbours rotate (2i, 2i + 1), and are put back into
the order in which halves do (i, i + R/2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(\w+)$")
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "output.bias": "lm_head.bias",
}
USED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
BEHIND = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
DEEPSEEK = ("deepseek_v2", "deepseek_v3")
TURNED = ("llama", "mixtral", "granite", "smollm3")
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

Turn = Literal["none", "query", "key"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor is: in which, at which expert, turned how. `beside`: its values lie in a tensor of their own."""

    name: str
    expert: int | None = None
    turn: Turn = "none"
    beside: str | None = None


def sources(family: str, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Source]:
    """By Hugging Face's names. `tensors`: the file's names and shapes. Unknown ones keep their names."""
    found: dict[str, Source] = {}
    for name, shape in tensors.items():
        layer = LAYER.match(name)
        if layer is None:
            if name not in USED:
                found[WHOLE.get(name, name)] = Source(name)
            continue
        at, part, last = layer.groups()
        if part in USED[0] or part == "attn_v_b" or part.startswith("rope_"):
            continue  # computed from the configuration; read beside the keys
        head = f"model.layers.{at}."
        if part in EXPERTS:
            for expert in range(shape[0]):
                found[f"{head}{_expert(family, part, expert)}.{last}"] = Source(name, expert)
        elif part == "exp_probs_b":
            found[f"{head}mlp.gate.e_score_correction_bias"] = Source(name)
        elif part == "attn_k_b":
            beside = name.replace("attn_k_b", "attn_v_b")
            found[f"{head}self_attn.kv_b_proj.{last}"] = Source(name, beside=beside)
        else:
            found[f"{head}{_part(family, part)}.{last}"] = Source(name, turn=_turn(family, part))
    return found


def _expert(family: str, part: str, expert: int) -> str:
    name = EXPERTS[part]
    if family == "mixtral":
        return f"block_sparse_moe.experts.{expert}.{MIXTRAL[name]}"
    return f"mlp.experts.{expert}.{name}"


def _part(family: str, part: str) -> str:
    if part in BEHIND:
        return BEHIND[part]
    if family.startswith("gemma") and part == "ffn_norm":
        return "pre_feedforward_layernorm"
    if family == "phi3" and part == "ffn_up":
        return "mlp.gate_up_proj"
    name = PARTS.get(part, part)
    if family == "mixtral" and part == "ffn_gate_inp":
        return "block_sparse_moe.gate"
    return name.replace("shared_expert.", "shared_experts.") if family in DEEPSEEK else name


def _turn(family: str, part: str) -> Turn:
    if family not in TURNED:
        return "none"
    return {"attn_q": "query", "attn_k": "key"}.get(part, "none")  # type: ignore[return-value]
