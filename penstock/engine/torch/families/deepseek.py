"""DeepSeek-V2 and V2-Lite: multi-head latent attention (heads.py), neighbours rotated, YaRN that also scales scores;
a few dense layers, then mixtures with shared experts that have no gate, routed in fp32.
"""

from __future__ import annotations

from typing import Any

from penstock.core.errors import BadModel
from penstock.engine.torch.families.read import experts_from, refuse, shape_from
from penstock.engine.torch.families.shape import Experts, Latent, Shape
from penstock.engine.torch.positions import read_rope
from penstock.engine.torch.reading import Reader

ROUTINGS = ("greedy", "group_limited_greedy")


def deepseek_v2(read: Reader) -> Shape:
    refuse(read, "attention_bias", "mlp_bias", "norm_topk_prob")
    context = read.integer("max_position_embeddings", 2048)
    rope = read_rope(read.config, context, read.where)
    latent = Latent(
        width=read.integer("kv_lora_rank", 512),
        rotated=read.integer("qk_rope_head_dim", 64),
        plain=read.integer("qk_nope_head_dim", 128),
        value=read.integer("v_head_dim", 128),
        query_rank=_query_rank(read),
    )
    width = latent.plain + latent.rotated
    return shape_from(
        read,
        "deepseek_v2",
        max_context=context,
        rope=rope,
        rotated=latent.rotated,
        width=width,
        score_scale=width**-0.5 * rope.score_factor,
        num_kv_heads=1,
        latent=latent,
        experts=_experts(read),
    )


def _query_rank(read: Reader) -> int | None:
    """null means that there is none; a file that does not say has DeepSeek-V2's."""
    if read.config.get("q_lora_rank", 1536) is None:
        return None
    return read.integer("q_lora_rank", 1536)


def _experts(read: Reader) -> Experts | None:
    wanted: dict[str, Any] = {"scoring_func": "softmax", "moe_layer_freq": 1}
    for key, value in wanted.items():
        if read.config.get(key, value) != value:
            raise BadModel(f"{read.where}: {key} {read.config[key]!r} is not supported")
    first = read.config.get("first_k_dense_replace") or 0
    if not isinstance(first, int) or first < 0:
        raise BadModel(f"{read.where}: first_k_dense_replace must be an integer, got {first!r}")
    layers = tuple(layer >= first for layer in range(read.integer("num_hidden_layers")))
    width = read.integer("moe_intermediate_size", 1407)
    shared = read.config.get("n_shared_experts", 2)
    return experts_from(
        read,
        layers,
        count=64,
        top_k=None,
        width=width,
        is_normed=False,
        scaling=read.number("routed_scaling_factor", 1.0),
        groups=_groups(read),
        is_exact=True,
        shared_width=width * read.integer("n_shared_experts", 2) if shared else None,
        is_gated=False,
        shared="shared_experts",
    )


def _groups(read: Reader) -> tuple[int, int] | None:
    routing = read.config.get("topk_method") or "greedy"
    if routing not in ROUTINGS:
        raise BadModel(
            f"{read.where}: topk_method {routing!r} is not supported",
            hint=f"supported are {', '.join(ROUTINGS)}",
        )
    if routing == "greedy":
        return None
    count, kept = read.integer("n_group"), read.integer("topk_group")
    experts = read.integer("n_routed_experts", 64)
    if kept > count or experts % count:
        raise BadModel(f"{read.where}: {kept} of {count} groups do not fit {experts} experts")
    return count, kept
