"""A linear method whose weights are packed once, for processors on which stock bfloat16 products are slow.

Without bfloat16 instructions, torch multiplies bfloat16 matrices at a tenth of the speed of float32 ones. Here the
weights are read as bfloat16 (half the bytes of float32) and multiplied as floats. Where the processor has those
instructions, oneDNN's packed weights are the better choice (`wins_on_this_machine` says no).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.torch.kernels import library as native
from penstock.engine.torch.kernels.build import AVX2, AVX512, processor_flags
from penstock.engine.torch.kernels.program import Recorder
from penstock.engine.torch.kernels.space import SPACE
from penstock.engine.torch.ports import Linear, ShardSpec

PANEL = 16


def wins_on_this_machine(dtype: torch.dtype) -> bool:
    """Whether `PackedLinear` is the method to take for weights of this type here. Measured on x86 only."""
    if dtype != torch.bfloat16 or processor_flags() & {"avx512_bf16", "amx_bf16"}:
        return False
    return bool(set(native.isas()) & {AVX512.name, AVX2.name})


class PackedLinear:
    """The LinearMethod."""

    name = "packed"

    def __init__(self, *, isa: str | None = None, library: native.Library | None = None) -> None:
        self.library, self.table = (
            native.pick(isa) if library is None else (library, library.tables[str(isa)])
        )

    @staticmethod
    def why_not_for(weight: Tensor) -> str | None:
        """Why this weight cannot be packed, or None if it can."""
        if weight.dtype not in (torch.float32, torch.bfloat16):
            return f"weights must be float32 or bfloat16, not {weight.dtype}"
        if weight.shape[1] % PANEL:
            return f"the number of inputs must be a multiple of {PANEL}, not {weight.shape[1]}"
        return None

    def pack(self, weight: Tensor, bias: Tensor | None, shard: ShardSpec) -> Linear:
        reason = self.why_not_for(weight)
        assert reason is None, reason
        num_out, num_in = weight.shape
        pair = 2 if weight.dtype == torch.bfloat16 else 1
        padded = F.pad(weight.detach(), (0, 0, 0, -num_out % PANEL))
        lines = padded.view(-1, PANEL, num_in // pair, pair).transpose(1, 2)
        panels = SPACE.empty(lines.shape, weight.dtype, self.library).copy_(lines)
        bias = None if bias is None else bias.detach().to(weight.dtype).contiguous()
        return _Packed(self.library, self.table, panels, bias, num_out)


@dataclass(frozen=True, slots=True, eq=False)
class _Packed:
    library: native.Library
    table: int
    panels: Tensor
    bias: Tensor | None
    num_out: int

    def __call__(self, x: Tensor) -> Tensor:
        num_in = self.panels.shape[1] * self.panels.shape[3]
        assert x.dtype == self.panels.dtype and x.dim() == 2 and x.shape[1] == num_in
        x = x if x.stride(1) == 1 else x.contiguous()
        out = torch.empty(x.shape[0], self.num_out, dtype=x.dtype)
        call = self._call(x, out)
        self.library.linear(self.table, ctypes.byref(call), torch.get_num_threads())
        return out

    def record(self, into: Recorder, x: Tensor, out: Tensor) -> None:
        into.call(self.library.linear, self._call(x, out), {"num_rows": into.ROWS})

    def _call(self, x: Tensor, out: Tensor) -> native.LinearCall:
        return native.LinearCall(
            x.data_ptr(),
            self.panels.data_ptr(),
            native.address(self.bias),
            out.data_ptr(),
            x.shape[0],
            x.shape[1],
            self.num_out,
            x.stride(0),
            native.is_bf16(x),
        )
