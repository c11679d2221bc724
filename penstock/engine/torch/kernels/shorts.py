"""A linear method for bfloat16 weights where a processor multiplies pairs of 16-bit whole numbers, but not bfloat16.

Weights are packed as whole numbers of 16 bits with a power of two for each output and group of inputs; rows are brought
to the same form on the way in. source/shorts.h has the formula and says why nothing overflows. Of normally distributed
numbers 19 of 20 are kept exactly, the others to a part in 4,000 of the group's typical size, and sums have
fewer roundings than those of floats: what is lost is a fortieth of what rounding the output to bfloat16 loses
(`benchmarks/linear_methods.py --errors`). Weights cost 16.125 bits each.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.torch.kernels import library as native
from penstock.engine.torch.kernels.build import AVX2, AVX512_VNNI
from penstock.engine.torch.kernels.packed_layer import PackedLayer
from penstock.engine.torch.kernels.program import Entry
from penstock.engine.torch.kernels.space import SPACE
from penstock.engine.torch.ports import Linear, ShardSpec

PANEL = 16
GROUPS = (128, 64, 32, 16)
ROWS_AT_ONCE = 1 << 12  # of a weight that is packed


def wins_on_this_machine() -> bool:
    """Whether `ShortsLinear` is the method to take for bfloat16 weights here. Measured with these two only."""
    return native.isas()[:1] in ([AVX2.name], [AVX512_VNNI.name])


class ShortsLinear:
    """The LinearMethod."""

    name = "packed"

    def __init__(self, *, isa: str | None = None, library: native.Library | None = None) -> None:
        self.library, self.table = (
            native.pick(isa) if library is None else (library, library.tables[str(isa)])
        )

    @staticmethod
    def why_not_for(weight: Tensor) -> str | None:
        """Why this weight cannot be packed, or None if it can."""
        if weight.dtype != torch.bfloat16:
            return f"weights must be bfloat16, not {weight.dtype}"
        if weight.shape[1] % PANEL:
            return f"the number of inputs must be a multiple of {PANEL}, not {weight.shape[1]}"
        return None

    def pack(self, weight: Tensor, bias: Tensor | None, shard: ShardSpec) -> Linear:
        reason = self.why_not_for(weight)
        assert reason is None, reason
        num_out, num_in = weight.shape
        group = next(size for size in GROUPS if num_in % size == 0)
        panels, groups = -(-num_out // PANEL), num_in // group
        codes = SPACE.empty((panels, num_in // 2, PANEL, 2), torch.int16, self.library)
        scales = SPACE.empty((panels, groups, PANEL), torch.bfloat16, self.library)
        for at in range(0, panels, ROWS_AT_ONCE // PANEL):
            some = slice(at, at + ROWS_AT_ONCE // PANEL)
            rows, steps = self._shortened(weight[at * PANEL : some.stop * PANEL], group)
            codes[some] = rows.view(-1, PANEL, num_in // 2, 2).transpose(1, 2)
            scales[some] = steps.view(-1, PANEL, groups).transpose(1, 2)
        return PackedShorts(
            library=self.library,
            table=self.table,
            codes=codes,
            scales=scales,
            bias=None if bias is None else bias.detach().contiguous(),
            num_out=num_out,
            num_in=num_in,
            group=group,
        )

    def _shortened(self, weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """(int16 like the weight, float32 [rows, groups]), padded to whole panels."""
        weight = weight.detach()
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        num_rows, num_in = weight.shape
        rows = torch.empty(num_rows, num_in, dtype=torch.int16)
        steps = torch.empty(num_rows, num_in // group)
        call = native.ShortsCall(x=weight.data_ptr(), rows=rows.data_ptr(), steps=steps.data_ptr())
        call.num_rows, call.num_in, call.x_stride = num_rows, num_in, weight.stride(0)
        call.group, call.bf16, call.is_plain = group, native.is_bf16(weight), 1
        self.library.shorten(self.table, ctypes.byref(call), torch.get_num_threads())
        rest = -num_rows % PANEL
        return (
            (F.pad(rows, (0, 0, 0, rest)), F.pad(steps, (0, 0, 0, rest))) if rest else (rows, steps)
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedShorts(PackedLayer):
    """Takes and gives bfloat16 or float32."""

    codes: Tensor
    scales: Tensor
    group: int

    @property
    def _entry(self) -> Entry:
        return self.library.shorts

    def _call(self, x: Tensor, out: Tensor, bias: Tensor | None) -> native.ShortsCall:
        assert x.dtype == out.dtype
        return native.ShortsCall(
            x.data_ptr(),
            native.address(bias),
            self.codes.data_ptr(),
            self.scales.data_ptr(),
            out.data_ptr(),
            None,
            None,
            x.shape[0],
            self.num_in,
            self.num_out,
            x.stride(0),
            self.group,
            native.is_bf16(x),
            0,
        )

    @property
    def num_bytes(self) -> int:
        """Read by a call, whatever the number of rows."""
        return self.codes.nbytes + self.scales.nbytes
