"""Linear layers in 8 and 4 bits: a Quantised weight packed into panels, and the call.

Rows of x are quantised to bytes on the way in, each group of inputs by its own step (128 at most, the weight's own
group if that is smaller), and products of bytes are summed exactly; source/quantised.h has the formula. Weights cost
their bits and a float16 scale a group: 8.125 or 4.125 bits a weight in groups of 128, 8.5 or 4.5 in groups of 32.

float16 scales are multiples of a power of two chosen for the layer, so scales that came as float16 (GGUF, GPTQ, AWQ)
stay what they were, and others are rounded by at most one part in 2,048.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.torch.kernels import library as native
from penstock.engine.torch.kernels.packed_layer import PackedLayer
from penstock.engine.torch.kernels.program import Entry
from penstock.engine.torch.kernels.space import SPACE
from penstock.engine.torch.ports import Linear
from penstock.engine.torch.quantised import MIDDLE, Quantised

PANEL = 16
CHUNK = 32
GROUPS = (128, 64, 32)  # what the kernel takes
LARGEST_HALF = 2.0**14  # what the largest scale is brought to


class PackedQuantised:
    """The QuantisedMethod of the kernels."""

    name = "packed"

    def __init__(self, *, isa: str | None = None, library: native.Library | None = None) -> None:
        self.library, self.table = (
            native.pick(isa) if library is None else (library, library.tables[str(isa)])
        )

    @staticmethod
    def why_not_for(weight: Quantised) -> str | None:
        """Why this weight cannot be packed, or None if it can."""
        if weight.group % CHUNK and weight.group != weight.shape[1]:
            return f"groups must be multiples of {CHUNK} inputs or all of them, not {weight.group}"
        return None

    def pack_quantised(self, weight: Quantised, bias: Tensor | None) -> Linear:
        reason = self.why_not_for(weight)
        assert reason is None, reason
        num_out, num_in = weight.shape
        width = num_in + -num_in % CHUNK
        group = next(size for size in GROUPS if (num_in if width == num_in else width) % size == 0)
        if weight.group != num_in:
            group = next(size for size in GROUPS if weight.group % size == 0)
        scales = _in_groups(weight.scales, weight.group, group, width)
        exponent = _exponent(scales)
        zeros = weight.zeros
        return PackedFewBits(
            library=self.library,
            table=self.table,
            codes=packed_codes(weight.codes, weight.bits, width, self.library),
            scales=_in_panels((scales * 2.0**-exponent).half()),
            zeros=None
            if zeros is None
            else _in_panels(_in_groups(zeros, weight.group, group, width)),
            order=None if weight.order is None else weight.order.to(torch.int32),
            bias=None if bias is None else bias.detach().contiguous(),
            num_out=num_out,
            num_in=num_in,
            unit=2.0**exponent,
            bits=weight.bits,
            group=group,
        )


def packed_codes(codes: Tensor, bits: int, width: int, library: native.Library) -> Tensor:
    """uint8 [out, in] -> [panels, width / 4 or / 8, 16, 4]: see source/bytes.h."""
    num_out, num_in = codes.shape
    padded = F.pad(codes, (0, width - num_in, 0, -num_out % PANEL), value=MIDDLE[bits])
    if bits == 8:
        lines = padded.bitwise_xor(128).view(-1, PANEL, width // 4, 4)
    else:
        halves = padded.view(-1, PANEL, width // 8, 2, 4)
        lines = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
    lines = lines.transpose(1, 2)
    return SPACE.empty(lines.shape, torch.uint8, library).copy_(lines)


def _in_groups(table: Tensor, given: int, wanted: int, width: int) -> Tensor:
    """[out, in / given] -> [out, width / wanted]: smaller groups of the same values."""
    times = width // wanted if table.shape[1] == 1 else given // wanted
    return table.repeat_interleave(times, 1)


def _in_panels(table: Tensor) -> Tensor:
    """[out, groups] -> [panels, groups, 16]"""
    padded = F.pad(table, (0, 0, 0, -table.shape[0] % PANEL))
    return padded.view(-1, PANEL, table.shape[1]).transpose(1, 2).contiguous()


def _exponent(scales: Tensor) -> int:
    """Of the power of two that scales are counted in."""
    largest = float(scales.abs().amax())
    return math.frexp(largest / LARGEST_HALF)[1] if 0 < largest < math.inf else 0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedFewBits(PackedLayer):
    """Takes and gives float32 or bfloat16."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    unit: float
    bits: int
    group: int

    @property
    def _entry(self) -> Entry:
        return self.library.quantised

    def _call(self, x: Tensor, out: Tensor, bias: Tensor | None) -> native.QuantisedCall:
        return native.QuantisedCall(
            x.data_ptr(),
            native.address(bias),
            self.codes.data_ptr(),
            self.scales.data_ptr(),
            native.address(self.zeros),
            native.address(self.order),
            out.data_ptr(),
            None,
            None,
            x.shape[0],
            self.num_in,
            self.num_out,
            x.stride(0),
            self.scales.shape[1],
            self.unit,
            self.bits,
            self.group,
            native.is_bf16(x),
        )

    @property
    def num_bytes(self) -> int:
        """Read by a call, whatever the number of rows."""
        tables = (self.codes, self.scales, self.zeros)
        return sum(one.numel() * one.element_size() for one in tables if one is not None)
