"""Rotary positions: frequencies of each kind, and a table of cosines and sines that grows with the longest text.

The first R dimensions of a head vector turn (all of them in most models), in pairs (i, i + R/2), by the angle
position * frequency_i. Frequencies: theta^(-2i/R), then

    linear   all divided by `factor`
    llama3   wavelengths above original/low are divided by `factor`, those under original/high kept, a blend between
    yarn     high frequencies kept, low ones divided by `factor`, a linear ramp between the dimensions that turn
             beta_fast and beta_slow times in the original context; cosines and sines times `attention_factor`
    longrope each divided by a factor of its own, one set of them for short texts and one for long ones; cosines and
             sines times `attention_factor` in both
    none     0: nothing turns, for layers to which positions are not told
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penstock.engine.torch.positions import Rope


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """float32 [R / 2] for a head of `head_dim` dimensions"""
    dims = rope.dims(head_dim)
    powers = rope.theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    plain = 1.0 / powers
    if rope.kind == "none":
        return torch.zeros_like(plain)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain, dims)
    if rope.kind == "longrope":
        return 1.0 / (
            torch.tensor(rope.long_factors if rope.is_long else rope.short_factors) * powers
        )
    return plain


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    waves = 2 * math.pi / plain
    longest = rope.original_context / rope.low_freq_factor
    shortest = rope.original_context / rope.high_freq_factor
    span = rope.high_freq_factor - rope.low_freq_factor
    blend = (rope.original_context / waves - rope.low_freq_factor) / span
    between = (1 - blend) * plain / rope.factor + blend * plain
    scaled = torch.where(waves > longest, plain / rope.factor, between)
    return torch.where(waves < shortest, plain, scaled)


def _yarn(rope: Rope, plain: Tensor, dims: int) -> Tensor:
    def dimension(turns: float) -> float:
        return (
            dims
            * math.log(rope.original_context / (turns * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    steps = torch.arange(dims // 2, dtype=torch.float32)
    ramp = ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


class RopeTable:
    """Cosines, then sines, of every position met so far: float32 [positions, R]."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self._scale, self._device = rope.attention_factor, device
        self._frequencies = frequencies(rope, head_dim)
        self._table = self._made(1024)

    def upto(self, context: int) -> Tensor:
        """A table that holds at least `context` positions. Two lanes may ask, and grow it, at once."""
        table = self._table
        if context > len(table):
            table = self._table = self._made(max(context, 2 * len(table)))
        return table

    def _made(self, size: int) -> Tensor:
        turns = torch.outer(torch.arange(size, dtype=torch.float32), self._frequencies)
        table = torch.cat((turns.cos(), turns.sin()), -1) * self._scale
        return table.to(self._device).contiguous()
