"""DeepSeek: multi-head latent attention (heads.py), neighbours rotated, YaRN that also scales scores; a few dense
layers, then mixtures with shared experts that have no gate, routed in fp32.

    deepseek_v2   V2 and V2-Lite: a softmax; a group is as good as its best expert
    deepseek_v3   V3, R1, Kimi-K2: sigmoids scaled to sum to one; a bias when choosing, groups by their best two

Layers beyond the last, which predict several tokens at once, are not read.
"""

from __future__ import annotations

from typing import Any

from penstock.core.errors import BadModel
from penstock.engine.torch.families.read import experts_from, refuse, shape_from
from penstock.engine.torch.families.shape import Experts, Latent, Shape
from penstock.engine.torch.positions import read_rope
from penstock.engine.torch.reading import Reader

ROUTINGS = ("greedy", "group_limited_greedy")


V3: dict[str, Any] = {
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "max_position_embeddings": 4096,
}


def deepseek_v2(read: Reader) -> Shape:
    refuse(read, "attention_bias", "mlp_bias", "norm_topk_prob")
    return _deepseek(read, "deepseek_v2", _experts(read))


def deepseek_v3(read: Reader) -> Shape:
    refuse(read, "attention_bias", "mlp_bias")
    read = read.over(**V3)
    if not read.flag("rope_interleave", True):
        raise BadModel(f"{read.where}: rope_interleave = false is not supported")
    return _deepseek(read, "deepseek_v3", _experts_of_v3(read))


def _deepseek(read: Reader, family: str, experts: Experts | None) -> Shape:
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
        family,
        max_context=context,
        rope=rope,
        rotated=latent.rotated,
        width=width,
        score_scale=width**-0.5 * rope.score_factor,
        num_kv_heads=1,
        latent=latent,
        experts=experts,
    )


def _query_rank(read: Reader) -> int | None:
    """null means that there is none; a file that does not say has DeepSeek-V2's."""
    if read.config.get("q_lora_rank", 1536) is None:
        return None
    return read.integer("q_lora_rank", 1536)


def _experts(read: Reader) -> Experts | None:
    _only(read, scoring_func="softmax")
    read = read.over(moe_intermediate_size=1407, n_shared_experts=2, n_routed_experts=64)
    return _mixture(read, is_normed=False, groups=_groups(read))


def _experts_of_v3(read: Reader) -> Experts | None:
    _only(read, scoring_func="sigmoid", topk_method="noaux_tc")
    count, kept = read.integer("n_group"), read.integer("topk_group")
    return _mixture(
        read,
        is_normed=read.flag("norm_topk_prob", True),
        groups=_fitting(read, count, kept) if count > 1 else None,
        scores="sigmoid",
        is_corrected=True,
    )


def _only(read: Reader, **wanted: object) -> None:
    for key, value in {**wanted, "moe_layer_freq": 1}.items():
        if read.config.get(key, value) != value:
            raise BadModel(f"{read.where}: {key} {read.config[key]!r} is not supported")


def _mixture(read: Reader, **more: Any) -> Experts | None:
    first = read.config.get("first_k_dense_replace") or 0
    if not isinstance(first, int) or first < 0:
        raise BadModel(f"{read.where}: first_k_dense_replace must be an integer, got {first!r}")
    width = read.integer("moe_intermediate_size")
    shared = read.config.get("n_shared_experts")
    return experts_from(
        read,
        tuple(layer >= first for layer in range(read.integer("num_hidden_layers"))),
        count=read.integer("n_routed_experts"),
        top_k=None,
        width=width,
        scaling=read.number("routed_scaling_factor", 1.0),
        is_exact=True,
        shared_width=width * read.integer("n_shared_experts") if shared else None,
        is_gated=False,
        shared="shared_experts",
        **more,
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
    return _fitting(read, read.integer("n_group"), read.integer("topk_group"))


def _fitting(read: Reader, count: int, kept: int) -> tuple[int, int]:
    experts = read.integer("n_routed_experts")
    if kept > count or experts % count:
        raise BadModel(f"{read.where}: {kept} of {count} groups do not fit {experts} experts")
    return count, kept
