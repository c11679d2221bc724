"""Rotary positions as a config.json tells them. Imports no torch; rope.py makes the tables.

They come in two spellings: `rope_theta` + `rope_scaling` (older) and `rope_parameters` (transformers 5). Kinds that
rescale with the length of the text in hand (dynamic, longrope) are refused: a cached key would have to be rotated
again whenever its text grows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from penstock.core.errors import BadModel
from penstock.engine.torch.reading import Config, number

RopeKind = Literal["default", "linear", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions. Fields beyond `theta` are read by the kinds that need them."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


def stretched(told: int, rope: Rope) -> int:
    """The context a scaled model reaches: linear and yarn state the unscaled one."""
    if rope.kind == "linear":
        return int(told * rope.factor)
    if rope.kind == "yarn":
        return max(told, int(rope.original_context * rope.factor))
    return told


def read_rope(config: Config, max_context: int, where: str) -> Rope:
    """Both spellings of rotary positions. Raises BadModel for the kinds that are not supported."""
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        raise BadModel(f"{where}: rope_parameters must be a table, got {table!r}")
    theta = number({**config, **table}, "rope_theta", 10000.0, where)
    kind = table.get("rope_type") or table.get("type") or "default"
    partial = number({**config, **table}, "partial_rotary_factor", 1.0, where)
    if kind not in ROPE_KINDS or partial != 1.0:
        told = f"rope type {kind!r}" if partial == 1.0 else f"partial_rotary_factor {partial}"
        raise BadModel(
            f"{where}: {told} is not supported", hint=f"supported are {', '.join(ROPE_KINDS)}"
        )
    if kind == "default":
        return Rope(theta=theta)
    original = number(table, "original_max_position_embeddings", max_context, where)
    factor = table.get("factor")
    if factor is None and kind == "yarn":
        factor = max_context / original
    scale = number({"factor": factor}, "factor", None, where)
    return Rope(
        kind=kind,
        theta=theta,
        factor=scale,
        original_context=int(original),
        low_freq_factor=number(table, "low_freq_factor", 1.0, where),
        high_freq_factor=number(table, "high_freq_factor", 4.0, where),
        beta_fast=number(table, "beta_fast", 32.0, where),
        beta_slow=number(table, "beta_slow", 1.0, where),
        truncate=bool(table.get("truncate", True)),
        attention_factor=_yarn_attention(table, scale, where) if kind == "yarn" else 1.0,
    )


def _yarn_attention(table: Config, factor: float, where: str) -> float:
    """YaRN's temperature: 0.1 ln(factor) + 1 unless the file says otherwise."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if table.get("attention_factor") is not None:
        return number(table, "attention_factor", None, where)
    if table.get("mscale") and table.get("mscale_all_dim"):
        over = mscale(number(table, "mscale_all_dim", None, where))
        return mscale(number(table, "mscale", None, where)) / over
    return mscale(1.0)
