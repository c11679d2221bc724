"""Weights of several forms made into one layer.

Layers that read the same input are computed as one. Their weights may have been stored in different forms: where one
form holds all of them unchanged, that is what they become (4 bits fit into 8, groups into finer ones); else they stay
apart, and their layer computes one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penstock.engine.torch.ports import Linear
from penstock.engine.torch.quantised import MIDDLE, Quantised, stacked

Weight = Tensor | Quantised
ROWS_AT_ONCE = 4096


def joined(parts: Sequence[Weight]) -> list[Weight]:
    """The rows of all parts, one below the other, in as few weights as can hold them as they are."""
    if len(parts) == 1:
        return list(parts)
    floats = [part for part in parts if isinstance(part, Tensor)]
    if len(floats) == len(parts):
        return [torch.cat(floats)]
    whole = [part for part in parts if isinstance(part, Quantised)]
    if floats or not _is_one_order(whole):
        return list(parts)
    return [_of_one_form(whole)]


def _is_one_order(parts: Sequence[Quantised]) -> bool:
    first = parts[0].order
    if first is None:
        return all(part.order is None for part in parts)
    return all(part.order is not None and torch.equal(part.order, first) for part in parts)


def _of_one_form(parts: Sequence[Quantised]) -> Quantised:
    group = math.gcd(*(part.group for part in parts))
    has_wide = any(part.bits == 8 for part in parts)
    plain = [
        replace(_finer(_wide(part) if has_wide else part, group), order=None) for part in parts
    ]
    return replace(stacked(plain), order=parts[0].order)


def _wide(part: Quantised) -> Quantised:
    """4 bits as 8: codes and zero points move up together."""
    if part.bits == 8:
        return part
    up = MIDDLE[8] - MIDDLE[4]
    zeros = None if part.zeros is None else part.zeros + up
    return replace(part, bits=8, codes=part.codes + up, zeros=zeros)


def _finer(part: Quantised, group: int) -> Quantised:
    times = part.group // group
    if times == 1:
        return part
    zeros = None if part.zeros is None else part.zeros.repeat_interleave(times, 1)
    return replace(part, group=group, scales=part.scales.repeat_interleave(times, 1), zeros=zeros)


def rows_of(weight: Weight, rows: Tensor) -> Weight:
    """Rows of a weight in the order of int64 `rows`."""
    if isinstance(weight, Tensor):
        return weight[rows]
    zeros = None if weight.zeros is None else weight.zeros[rows]
    return replace(weight, codes=weight.codes[rows], scales=weight.scales[rows], zeros=zeros)


def moved(weight: Quantised, device: torch.device) -> Quantised:
    if weight.codes.device == device:
        return weight
    zeros = None if weight.zeros is None else weight.zeros.to(device)
    order = None if weight.order is None else weight.order.to(device)
    codes, scales = weight.codes.to(device), weight.scales.to(device)
    return replace(weight, codes=codes, scales=scales, zeros=zeros, order=order)


def expanded(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """In floating point, some rows at a time: the fp32 form of a vocabulary is several times the model."""
    num_out = len(weight.codes)
    if num_out <= ROWS_AT_ONCE:
        return weight.expand().to(dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    for first in range(0, num_out, ROWS_AT_ONCE):
        rows = torch.arange(first, min(first + ROWS_AT_ONCE, num_out), device=out.device)
        some = rows_of(weight, rows)
        assert isinstance(some, Quantised)
        out[first : first + len(rows)] = some.expand()
    return out


@dataclass(slots=True)
class Apart:
    """A layer whose outputs come from several, side by side."""

    parts: tuple[Linear, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)
