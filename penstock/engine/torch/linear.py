"""Linear methods: how a weight is packed once and then applied to any number of rows.

    plain    torch's own F.linear; any device, any dtype
    onednn   oneDNN's blocked layout, made at load. For fp32 it halves the time of 8 rows, for bf16 (on processors with
             bf16 instructions) also of a single row
    packed   our own kernel (kernels/linear.py), for bf16 on processors without bf16 instructions, where torch's bf16
             product of 8 rows is several times slower than the fp32 one
    widened  the same without a compiler: weights are kept packed in fp32 and rows are widened on the way in. Costs
             twice the memory of the weights

`choose_linear` says which one and why. Figures: `python benchmarks/linear_methods.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.torch.kernels.linear import PackedLinear, wins_on_this_machine
from penstock.engine.torch.ports import Linear, LinearMethod, ShardSpec

ROWS_HINT = 8  # oneDNN picks a layout for about this many rows


@dataclass(slots=True)
class _Plain:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(slots=True)
class _OneDnn:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


@dataclass(slots=True)
class _Widened:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.float(), self.weight, self.bias, "none", [], ""
        )
        return out.to(x.dtype)


class PlainLinear:
    name = "plain"

    def pack(self, weight: Tensor, bias: Tensor | None, shard: ShardSpec) -> Linear:
        return _Plain(weight, bias)


class OneDnnLinear:
    name = "onednn"

    def pack(self, weight: Tensor, bias: Tensor | None, shard: ShardSpec) -> Linear:
        return _OneDnn(torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT), bias)


class WidenedLinear:
    name = "widened"

    def pack(self, weight: Tensor, bias: Tensor | None, shard: ShardSpec) -> Linear:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.float(), ROWS_HINT)
        return _Widened(packed, None if bias is None else bias.float())


def has_bf16_instructions() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_bf16_fast() -> bool:
    """Whether bf16 weights are no slower than fp32 ones on this CPU."""
    return has_bf16_instructions() or wins_on_this_machine(torch.bfloat16)


def can_pack() -> bool:
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def choose_linear(device: torch.device, dtype: torch.dtype) -> tuple[LinearMethod, str]:
    """The method for a device and dtype, and why."""
    if device.type != "cpu":
        return PlainLinear(), f"{device.type}: torch's own product"
    if not can_pack():
        return PlainLinear(), "this torch was built without oneDNN's packed layout"
    if dtype == torch.bfloat16 and not has_bf16_instructions():
        if wins_on_this_machine(dtype):
            return CompiledLinear(), "no bf16 instructions here; compiled kernel"
        return WidenedLinear(), "no bf16 instructions here, and no compiled kernel"
    return OneDnnLinear(), "oneDNN's packed layout"


class CompiledLinear:
    """Our kernel where it can hold the weight, else the widened form."""

    name = "packed"

    def __init__(self) -> None:
        self._kernel, self._other = PackedLinear(), WidenedLinear()

    def pack(self, weight: Tensor, bias: Tensor | None, shard: ShardSpec) -> Linear:
        method = self._other if PackedLinear.why_not_for(weight) else self._kernel
        return method.pack(weight, bias, shard)
