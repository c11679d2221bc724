"""Phi: two families of one name that have little in common.

phi     1, 1.5 and 2: one layer norm with bias before attention and MLP, which are added together; biases
        everywhere, the head's too; GELU without a gate; a part of each head turns
phi3    3, 3.5, 4: a Llama whose checkpoints hold q, k, v in one tensor and gate, up in another; LongRoPE in the
        long variants (positions.py); in mini variants of 4 a part of each head turns
"""

from __future__ import annotations

from collections.abc import Mapping

from penstock.engine.torch.families.read import one_window, refuse, shape_from
from penstock.engine.torch.families.shape import Names, Shape
from penstock.engine.torch.reading import Reader

PHI = Names(
    out="self_attn.dense",
    gate=None,
    up="mlp.fc1",
    down="mlp.fc2",
    mlp_norm=None,
    final_norm="final_layernorm",
)
QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"
PHI3 = Names(q=QKV, k=QKV, v=QKV, gate=GATE_UP, up=GATE_UP)
LONG = ("su", "yarn")  # what files of the first months called LongRoPE


def phi(read: Reader) -> Shape:
    refuse(read, "qk_layernorm")
    read = read.over(hidden_act="gelu_new", partial_rotary_factor=0.5)
    return shape_from(
        read,
        "phi",
        max_context=2048,
        turns_partly=True,
        norm="layer",
        norm_eps=read.number("layer_norm_eps", 1e-5),
        names=PHI,
        has_qkv_bias=True,
        has_out_bias=True,
        has_mlp_bias=True,
        has_head_bias=True,
    )


def phi3(read: Reader) -> Shape:
    read = read.over(rms_norm_eps=1e-5, original_max_position_embeddings=4096)
    told = read.config.get("rope_scaling")
    if isinstance(told, Mapping) and (told.get("rope_type") or told.get("type")) in LONG:
        read = Reader(
            {**read.config, "rope_scaling": {**told, "rope_type": "longrope"}}, read.where
        )
    return shape_from(
        read,
        "phi3",
        max_context=4096,
        turns_partly=True,
        windows=one_window(read),
        names=PHI3,
    )
