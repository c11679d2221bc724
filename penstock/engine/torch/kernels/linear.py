"""A linear method whose weights are packed once and whose calls can be recorded.

bfloat16 weights are read as they are. Where the processor has an instruction that multiplies pairs of them
(AVX512_BF16), it does; elsewhere they are multiplied as floats, at several times the speed of stock bfloat16 products.
Either way an output is one chain of sums in float32, in the order of the inputs, so a row has the same bits alone and
among others, called or recorded, on one thread or many. The two ways round differently.

Processors with AMX multiply whole tiles. Nothing was written for them, as nothing could be run: there oneDNN's packed
weights are taken, unmeasured (`wins_on_this_machine` says no).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.torch.kernels import library as native
from penstock.engine.torch.kernels.build import (
    AVX2,
    AVX512,
    AVX512_BF16,
    AVX512_VNNI,
    processor_flags,
)
from penstock.engine.torch.kernels.packed_layer import PackedLayer
from penstock.engine.torch.kernels.program import Entry
from penstock.engine.torch.kernels.space import SPACE
from penstock.engine.torch.ports import Linear, ShardSpec

PANEL = 16


def wins_on_this_machine(dtype: torch.dtype) -> bool:
    """Whether `PackedLinear` is the method to take for weights of this type here. Measured on x86 only."""
    if dtype != torch.bfloat16 or "amx_bf16" in processor_flags():
        return False
    measured = {one.name for one in (AVX512_BF16, AVX512_VNNI, AVX512, AVX2)}
    return bool(measured & set(native.isas()))


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
        return PackedNumbers(
            library=self.library,
            table=self.table,
            panels=panels,
            bias=None if bias is None else bias.detach().to(weight.dtype).contiguous(),
            num_out=num_out,
            num_in=num_in,
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedNumbers(PackedLayer):
    """Takes and gives the type of its weights."""

    panels: Tensor

    @property
    def _entry(self) -> Entry:
        return self.library.linear

    def _call(self, x: Tensor, out: Tensor, bias: Tensor | None) -> native.LinearCall:
        assert x.dtype == out.dtype == self.panels.dtype
        return native.LinearCall(
            x.data_ptr(),
            self.panels.data_ptr(),
            native.address(bias),
            out.data_ptr(),
            x.shape[0],
            self.num_in,
            self.num_out,
            x.stride(0),
            native.is_bf16(x),
        )
