"""A weight in few bits, as every reader of checkpoints leaves it and every linear method takes it.

    w[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g])        g = i // group

One code a byte: the form of one layer on its way from a file to a packed layout, not the form that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Bits = Literal[4, 8]
MIDDLE: dict[int, int] = {4: 8, 8: 128}  # the code of zero where there are no zero points


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Quantised:
    """See the module's text.

    codes   uint8 [out, in], 0..15 of 4 bits, 0..255 of 8
    scales  float32 [out, in / group]
    zeros   uint8 like `scales`; None: MIDDLE[bits] everywhere
    group   inputs that share a scale; a divisor of `in`
    order   int64 [in] or None: what the codes multiply is x[:, order]
    """

    bits: Bits
    codes: Tensor
    scales: Tensor
    group: int
    zeros: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        num_out, num_in = self.codes.shape
        assert num_in % self.group == 0, f"groups of {self.group} do not divide {num_in} inputs"
        assert self.scales.shape == (num_out, num_in // self.group), self.scales.shape
        assert self.zeros is None or self.zeros.shape == self.scales.shape

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def expand(self) -> Tensor:
        """The weight in float32, [out, in], its columns in the order of the inputs."""
        zeros = MIDDLE[self.bits] if self.zeros is None else self.zeros.float()[..., None]
        codes = self.codes.float().view(*self.scales.shape, self.group)
        weight = (self.scales[..., None] * (codes - zeros)).flatten(1)
        return weight if self.order is None else weight[:, self.order.argsort()]


def stacked(parts: Sequence[Quantised]) -> Quantised:
    """Rows of all parts, one below the other. They must be of one form."""
    first = parts[0]
    assert all((p.bits, p.group, p.order is None) == (first.bits, first.group, True) for p in parts)
    zeros = None
    if any(p.zeros is not None for p in parts):
        middle = MIDDLE[first.bits]
        zeros = torch.cat(
            [
                torch.full_like(p.scales, middle, dtype=torch.uint8) if p.zeros is None else p.zeros
                for p in parts
            ]
        )
    return Quantised(
        bits=first.bits,
        codes=torch.cat([p.codes for p in parts]),
        scales=torch.cat([p.scales for p in parts]),
        group=first.group,
        zeros=zeros,
    )


def quantise(weight: Tensor, bits: Bits, group: int) -> Quantised:
    """The nearest codes of a weight [out, in], symmetric around zero: the largest of a group becomes 127, or 7."""
    num_out, num_in = weight.shape
    grouped = weight.float().view(num_out, num_in // group, group)
    most = 127 if bits == 8 else 7
    scales = grouped.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / most
    codes = (grouped / scales[..., None]).round_().clamp_(-most, most).add_(MIDDLE[bits])
    return Quantised(bits=bits, codes=codes.to(torch.uint8).flatten(1), scales=scales, group=group)
