"""Rotary positions as a config.json tells them. Imports no torch; rope.py makes the tables.

They come in two spellings: `rope_theta` + `rope_scaling` (older) and `rope_parameters` (transformers 5). The kind that
rescales with the length of the text in hand (dynamic) is refused: a cached key would have to be rotated again whenever
its text grows. LongRoPE has two sets of factors, for texts within the trained context and for longer ones. A cached key
cannot change from one to the other either, so an engine serves all its texts with one set, chosen by the longest
text that it allows (`Rope.serving`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from penstock.core.errors import BadModel
from penstock.engine.torch.reading import Config, number

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope", "none"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn", "longrope")
OLDER_NAMES = {"su": "longrope"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions. Fields beyond `theta` and `partial` are read by the kinds that need them.

    partial            share of a head's dimensions that turn, the first ones
    short_factors, long_factors   of LongRoPE, one a pair of dimensions; `is_long` says which are in use
    score_factor       scores are multiplied by this (YaRN, in models that state mscale_all_dim and ask for it)
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    partial: float = 1.0
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    score_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    is_long: bool = False

    def dims(self, head_dim: int) -> int:
        """Dimensions of a head that turn."""
        return int(head_dim * self.partial)

    def serving(self, context: int) -> Rope:
        """As it is for texts of at most `context` positions."""
        return replace(self, is_long=self.kind == "longrope" and context > self.original_context)


STILL = Rope(kind="none")  # of layers to which positions are not told


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
    both = {**config, **table}
    theta = number(both, "rope_theta", 10000.0, where)
    partial = number(both, "partial_rotary_factor", 1.0, where)
    kind = table.get("rope_type") or table.get("type") or "default"
    kind = OLDER_NAMES.get(str(kind), kind)
    if kind not in ROPE_KINDS:
        raise BadModel(
            f"{where}: rope type {kind!r} is not supported",
            hint=f"supported are {', '.join(ROPE_KINDS)}",
        )
    if not 0 < partial <= 1:
        raise BadModel(f"{where}: partial_rotary_factor must be in (0, 1], got {partial}")
    if kind == "default":
        return Rope(theta=theta, partial=partial)
    told = both if kind == "longrope" else table
    original = number(told, "original_max_position_embeddings", max_context, where)
    factor = table.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = max_context / original
    scale = number({"factor": factor}, "factor", None, where)
    rope = Rope(
        kind=kind, theta=theta, partial=partial, factor=scale, original_context=int(original)
    )
    if kind == "llama3":
        return replace(
            rope,
            low_freq_factor=number(table, "low_freq_factor", 1.0, where),
            high_freq_factor=number(table, "high_freq_factor", 4.0, where),
        )
    if kind == "yarn":
        return _yarn(rope, table, where)
    return _long(rope, table, where) if kind == "longrope" else rope


def check_factors(rope: Rope, head_dim: int, where: str) -> None:
    """Raises BadModel unless LongRoPE has a factor for each pair of dimensions, and pairs are whole."""
    dims = rope.dims(head_dim)
    if dims < 2 or dims % 2:
        raise BadModel(f"{where}: {dims} of {head_dim} dimensions of a head cannot turn in pairs")
    if rope.kind == "longrope":
        for key, factors in (
            ("short_factor", rope.short_factors),
            ("long_factor", rope.long_factors),
        ):
            if len(factors) != dims // 2:
                raise BadModel(
                    f"{where}: {key} lists {len(factors)} numbers for {dims // 2} pairs of dimensions"
                )


def _yarn(rope: Rope, table: Config, where: str) -> Rope:
    """The temperature is 0.1 ln(factor) + 1 unless the file says otherwise."""

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    over = 1.0
    if table.get("mscale_all_dim"):
        over = mscale(number(table, "mscale_all_dim", None, where))
    if table.get("attention_factor") is not None:
        attention = number(table, "attention_factor", None, where)
    elif table.get("mscale") and table.get("mscale_all_dim"):
        attention = mscale(number(table, "mscale", None, where)) / over
    else:
        attention = mscale(1.0)
    return replace(
        rope,
        beta_fast=number(table, "beta_fast", 32.0, where),
        beta_slow=number(table, "beta_slow", 1.0, where),
        truncate=bool(table.get("truncate", True)),
        attention_factor=attention,
        score_factor=over * over,
    )


def _long(rope: Rope, table: Config, where: str) -> Rope:
    """The temperature is sqrt(1 + ln(factor) / ln(original context)) unless the file says otherwise."""
    attention = 1.0
    if rope.factor > 1:
        attention = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_context))
    return replace(
        rope,
        attention_factor=number(table, "attention_factor", attention, where),
        short_factors=_factors(table, "short_factor", where),
        long_factors=_factors(table, "long_factor", where),
    )


def _factors(table: Config, key: str, where: str) -> tuple[float, ...]:
    told = table.get(key)
    if not isinstance(told, list) or not all(
        isinstance(one, (int, float)) and one > 0 for one in told
    ):
        raise BadModel(f"{where}: {key} must be a list of positive numbers, got {told!r}")
    return tuple(float(one) for one in told)
