"""Linear methods: how a weight is packed once and then applied to any number of rows.

Of weights as numbers:

    plain    torch's own F.linear; any device, any dtype
    onednn   oneDNN's blocked layout, made at load: for fp32, and for bf16 on processors with AMX, or with bf16
             instructions where our kernels are not there or not measured (ARM)
    packed   our own kernels, for bf16 on all other x86 processors: products of pairs of bf16 where there is an
             instruction for them, else of 16-bit whole numbers (kernels/shorts.py) or, for routers and where the
             processor has no fast ones, of floats (kernels/linear.py)
    widened  the same without a compiler and without bf16 instructions: weights are kept packed in fp32 and rows are
             widened on the way in. Costs twice the memory of the weights
    row      on CUDA where Triton is: torch's own product, but for a single row (cuda/linear.py)

Of weights in few bits (quantised.py):
    packed     our own kernel. On CPUs (kernels/quantised.py) rows are quantised to bytes too, and bytes are
               multiplied; on CUDA (cuda/linear.py) rows stay what they are
    expanded   without it: weights are numbers again before a method of the first kind packs them

A choice of `weights` other than "stored" quantises what is stored as numbers when it is loaded:

    int8   groups of 128 inputs, every layer
    int4   groups of 32 inputs; the head, whose errors nothing downstream averages away, has 8 bits

Tables of tokens are looked up, not multiplied, and stay as they are; so do routers, which are small and whose errors
would send tokens to other experts. `choose_methods` says which methods and why. Figures:
`python benchmarks/linear_methods.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.torch.kernels import available, isas
from penstock.engine.torch.kernels.build import AVX512_BF16, processor_flags
from penstock.engine.torch.kernels.fused import has_triton
from penstock.engine.torch.kernels.linear import PackedLinear, wins_on_this_machine
from penstock.engine.torch.kernels.quantised import PackedQuantised
from penstock.engine.torch.kernels.shorts import ShortsLinear
from penstock.engine.torch.kernels.shorts import wins_on_this_machine as has_fast_shorts
from penstock.engine.torch.ports import Linear, LinearMethod, QuantisedMethod, ShardSpec
from penstock.engine.torch.quantised import Bits, Quantised, quantise

Weights = Literal["stored", "int8", "int4"]
GROUPS: dict[int, tuple[int, ...]] = {
    8: (128, 64, 32),
    4: (32,),
}  # the first that divides the inputs
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "avx_ne_convert"})
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
    """Torch says so of every processor with AVX-512; oneDNN makes do without, at a third of fp32's speed."""
    flags = processor_flags()  # empty where the processor is no x86
    is_there = not flags or bool(flags & BF16_FLAGS)
    return is_there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_bf16_fast() -> bool:
    """Whether bf16 weights are no slower than fp32 ones on this CPU."""
    return has_bf16_instructions() or wins_on_this_machine(torch.bfloat16)


def can_pack() -> bool:
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def choose_linear(device: torch.device, dtype: torch.dtype) -> tuple[LinearMethod, str]:
    """The method for a device and dtype, and why."""
    if device.type == "cuda" and has_triton():
        from penstock.engine.torch.cuda.linear import RowLinear

        return RowLinear(), "cuda: torch's own product, and a program of ours for a single row"
    if device.type != "cpu":
        return PlainLinear(), f"{device.type}: torch's own product"
    if not can_pack():
        return PlainLinear(), "this torch was built without oneDNN's packed layout"
    other: LinearMethod = OneDnnLinear()
    why = "oneDNN's packed layout"
    if dtype == torch.bfloat16 and not has_bf16_instructions():
        other, why = WidenedLinear(), "no bf16 instructions here, and no compiled kernel"
    if wins_on_this_machine(dtype):
        return CompiledLinear("packed", other), f"compiled kernel, products of {_factors()}"
    return other, why


class CompiledLinear:
    """Our kernels where they can hold the weight, else another method. `is_exact`: of numbers as they are only."""

    def __init__(self, name: str, other: LinearMethod, *, is_exact: bool = False) -> None:
        self.name, self._other, self._is_exact = name, other, is_exact
        self._kernel = PackedLinear() if available() else None
        self._shorts = ShortsLinear() if has_fast_shorts() and not is_exact else None

    def pack(self, weight: Tensor, bias: Tensor | None, shard: ShardSpec) -> Linear:
        method = self._other
        if self._shorts and not ShortsLinear.why_not_for(weight):
            method = self._shorts
        elif self._kernel and not PackedLinear.why_not_for(weight):
            method = self._kernel
        return method.pack(weight, bias, shard)

    @property
    def exact(self) -> LinearMethod:
        return self if self._is_exact else CompiledLinear(self.name, self._other, is_exact=True)


class ExpandedQuantised:
    """Numbers again, for whichever method there is for them."""

    name = "expanded"

    def __init__(self, method: LinearMethod, dtype: torch.dtype) -> None:
        self._method, self._dtype = method, dtype

    def pack_quantised(self, weight: Quantised, bias: Tensor | None) -> Linear:
        return self._method.pack(weight.expand().to(self._dtype), bias, ShardSpec())


class Kernel(QuantisedMethod, Protocol):
    """One that cannot hold every weight."""

    @staticmethod
    def why_not_for(weight: Quantised) -> str | None: ...


class CompiledQuantised:
    """Our kernel where it can hold the weight, else the expanded form."""

    name = "packed"

    def __init__(self, kernel: Kernel, other: ExpandedQuantised) -> None:
        self._kernel, self._other = kernel, other

    def pack_quantised(self, weight: Quantised, bias: Tensor | None) -> Linear:
        method = self._other if self._kernel.why_not_for(weight) else self._kernel
        return method.pack_quantised(weight, bias)


class QuantisingLinear:
    """The LinearMethod that first brings a weight to few bits. `exact` is for layers that must not be."""

    def __init__(self, method: QuantisedMethod, bits: Bits, exact: LinearMethod) -> None:
        self.method, self.bits, self.exact = method, bits, exact
        self.name = f"int{bits}-{method.name}"

    def pack(self, weight: Tensor, bias: Tensor | None, shard: ShardSpec) -> Linear:
        num_in = weight.shape[1]
        group = next((size for size in GROUPS[self.bits] if num_in % size == 0), num_in)
        return self.method.pack_quantised(quantise(weight, self.bits, group), bias)

    @property
    def head(self) -> LinearMethod:
        return QuantisingLinear(self.method, 8, self.exact)


def for_head(method: LinearMethod) -> LinearMethod:
    """What packs a model's head where `method` packs its layers."""
    return method.head if isinstance(method, QuantisingLinear) else method


def for_router(method: LinearMethod) -> LinearMethod:
    """What packs what chooses experts where `method` packs the layers."""
    if isinstance(method, QuantisingLinear):
        method = method.exact
    return method.exact if isinstance(method, CompiledLinear) else method


def choose_quantised(device: torch.device, dtype: torch.dtype) -> tuple[QuantisedMethod, str]:
    """The method for weights in few bits, and why."""
    other = ExpandedQuantised(choose_linear(device, dtype)[0], dtype)
    if device.type == "cuda" and has_triton():
        from penstock.engine.torch.cuda.linear import CodesLinear

        return CompiledQuantised(CodesLinear(), other), "compiled by Triton"
    if device.type != "cpu":
        return other, f"{device.type}: weights are {_name(dtype)} again"
    if not available():
        return other, f"no compiled kernel: weights are {_name(dtype)} again"
    return CompiledQuantised(PackedQuantised(), other), "compiled kernel"


@dataclass(frozen=True, slots=True)
class Methods:
    """Of weights that are stored as numbers, of those that are stored in few bits, and why these, for notes."""

    layers: LinearMethod
    quantised: QuantisedMethod
    notes: dict[str, str]


def choose_methods(
    device: torch.device, dtype: torch.dtype, weights: Weights = "stored", *, is_plain: bool = False
) -> Methods:
    """`is_plain`: torch's own product was asked for."""
    method, why = choose_linear(device, dtype)
    quantised, why_quantised = choose_quantised(device, dtype)
    if is_plain:
        method, why = PlainLinear(), "asked for"
        quantised, why_quantised = ExpandedQuantised(method, dtype), "asked for"
    if weights == "stored":
        return Methods(method, quantised, {"linear": f"{method.name}: {why}"})
    layers = QuantisingLinear(quantised, 8 if weights == "int8" else 4, method)
    return Methods(
        layers,
        quantised,
        {
            "linear": f"{layers.name}: {why_quantised}",
            "weights": "int8: groups of 128"
            if weights == "int8"
            else "int4: groups of 32; the head int8, groups of 128",
        },
    )


def mappable(methods: Methods) -> Methods:
    """The same where packed layers are to lie in memory that several processes map, which oneDNN's cannot."""
    if methods.layers.name not in ("onednn", "widened", "packed"):
        return methods
    notes = {**methods.notes, "linear": "shared: a layout that several processes can map"}
    # Torch's own product may lie in shared memory too.
    return Methods(CompiledLinear("shared", PlainLinear()), methods.quantised, notes)


def _factors() -> str:
    """What our kernels multiply for weights of bf16."""
    if has_fast_shorts():
        return "16-bit whole numbers"
    return "bf16" if isas()[0] == AVX512_BF16.name else "floats"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
