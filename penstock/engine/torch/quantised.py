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
    """Codes of a weight [out, in] in symmetric groups.

    8 bits: the largest of a group becomes 127. 4 bits: of TRIES, those whose squared errors are the least, which takes
    a quarter off what the plain rule leaves.
    """
    num_out, num_in = weight.shape
    codes = torch.empty(num_out, num_in, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(num_out, num_in // group, device=weight.device)
    rows = max(1, (AT_ONCE if weight.device.type == "cpu" else AT_ONCE_ELSEWHERE) // num_in)
    for at in range(0, num_out, rows):
        part = weight[at : at + rows].float().view(-1, num_in // group, group)
        found = _nearest(part) if bits == 8 else _least_error(part)
        codes[at : at + rows] = (found[0] + MIDDLE[bits]).to(torch.uint8).flatten(1)
        scales[at : at + rows] = found[1][..., 0]
    return Quantised(bits=bits, codes=codes, scales=scales, group=group)


AT_ONCE = 1 << 17  # numbers that are worked on at a time, so that they stay in a cache
AT_ONCE_ELSEWHERE = 1 << 26  # a card wants many
TRIES = (
    -8.0,
    -9.0,
    7.5,
)  # what the number of the largest size becomes, before codes are kept within -8..7


def _nearest(part: Tensor) -> tuple[Tensor, Tensor]:
    """(codes around zero, scales [..., 1]) of groups [..., group]"""
    scales = part.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (part / scales).round_().clamp_(-127, 127), scales


def _least_error(part: Tensor) -> tuple[Tensor, Tensor]:
    """The same in 4 bits; scales may be negative.

    With the best scale for its codes, c.w / c.c, a try leaves w.w - (c.w)^2 / c.c. The codes are then fitted to the
    scale once more.
    """
    largest = part.gather(-1, part.abs().argmax(-1, keepdim=True))
    inverse = torch.where(largest.abs() < TINY, 1.0, largest).reciprocal_()
    most, scales = torch.zeros_like(largest), torch.ones_like(largest)
    for goal in TRIES:
        codes = (part * (inverse * goal)).round_().clamp_(-8, 7)
        along = torch.linalg.vecdot(codes, part)[..., None]
        scale = along / torch.linalg.vecdot(codes, codes)[..., None].clamp_min_(1)
        gain = along * scale
        is_more = gain > most
        most, scales = torch.where(is_more, gain, most), torch.where(is_more, scale, scales)
    return (part / scales).round_().clamp_(-8, 7), scales


TINY = 1e-30
