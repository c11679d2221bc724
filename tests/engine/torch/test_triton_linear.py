"""Linear layers in Triton against float64 arithmetic: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional as F

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip(
    "triton",
    reason="Triton comes with torch's CUDA builds; without one, pip install it to interpret",
)

from penstock.engine.torch.cuda.linear import (  # noqa: E402
    TILED_ROWS,
    CodesLinear,
    RowLinear,
)
from penstock.engine.torch.ports import Gating, ShardSpec  # noqa: E402
from penstock.engine.torch.quantised import Bits, Quantised, quantise  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SIXTEEN = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter cannot multiply bfloat16


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def near(out: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """By the norm of the whole: single outputs may cancel."""
    assert out.shape == wanted.shape and out.dtype == dtype
    error = (out.double() - wanted).norm() / wanted.norm()
    assert error < (2e-6 if dtype is torch.float32 else 5e-3), float(error)


@pytest.mark.parametrize("dtype", [torch.float32, SIXTEEN])
@pytest.mark.parametrize("shape", [(37, 96), (12, 1536), (30, 1000), (6, 4100)])
def test_rows_of_numbers(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, bias = drawn(*shape).to(dtype), drawn(shape[0], seed=1).to(dtype)
    x = drawn(19, shape[1], seed=2).to(dtype)
    for each in (None, bias):
        layer = RowLinear().pack(weight, each, ShardSpec())
        shift = 0 if each is None else each.double()
        for rows in (x[:1], x[1:2], x[:3], x[:16], x):
            near(layer(rows), rows.double() @ weight.double().T + shift, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, SIXTEEN])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("num_out", "num_in", "group"), [(37, 256, 128), (70, 320, 32), (16, 192, 192)]
)
@pytest.mark.parametrize("form", ["plain", "zeros and bias", "order"])
def test_few_bits(
    dtype: torch.dtype, bits: Bits, num_out: int, num_in: int, group: int, form: str
) -> None:
    """One row, a tile that is not full, two tiles, and more rows than are tiled."""
    told = quantise(drawn(num_out, num_in), bits, group)
    bias = None
    if form == "zeros and bias":
        seed = torch.Generator().manual_seed(3)
        zeros = torch.randint(0, 1 << bits, told.scales.shape, generator=seed, dtype=torch.uint8)
        told = Quantised(
            bits=bits, codes=told.codes, scales=told.scales, group=group, zeros=zeros.to(DEVICE)
        )
        bias = drawn(num_out, seed=1).to(dtype)
    elif form == "order":
        order = torch.randperm(num_in, generator=torch.Generator().manual_seed(4)).to(DEVICE)
        told = Quantised(bits=bits, codes=told.codes, scales=told.scales, group=group, order=order)
    assert CodesLinear.why_not_for(told) is None
    layer = CodesLinear().pack_quantised(told, bias)
    weight, shift = told.expand().double(), 0 if bias is None else bias.double()
    for rows in (1, 5, 67, TILED_ROWS + 3)[: 4 if form == "plain" or ON_GPU else 2]:
        x = drawn(rows, num_in, seed=2).to(dtype)
        near(layer(x), x.double() @ weight.T + shift, dtype)


def test_a_weight_whose_groups_do_not_halve_is_refused() -> None:
    told = quantise(drawn(16, 8 * 3), 4, 24)
    assert "power of two" in str(CodesLinear.why_not_for(told))


@pytest.mark.parametrize("is_gelu", [False, True])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_gates_on_the_way_out(bits: Bits | None, is_gelu: bool) -> None:
    weight, bias = drawn(2 * 37, 128), drawn(2 * 37, seed=1)
    layer: Gating
    if bits is None:
        layer = RowLinear().pack(weight, bias, ShardSpec())
    else:
        told = quantise(weight, bits, 32)
        layer, weight = CodesLinear().pack_quantised(told, bias), told.expand()
    for rows in (1, 3):
        x = drawn(rows, 128, seed=2)
        gate, up = (x.double() @ weight.double().T + bias.double()).chunk(2, 1)
        active = F.gelu(gate, approximate="tanh") if is_gelu else F.silu(gate)
        near(layer.gated(x, is_gelu), active * up, torch.float32)
