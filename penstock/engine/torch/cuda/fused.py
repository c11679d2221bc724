"""The small operations between matrix products, in Triton: as kernels/fused.py does them on CPUs, one pass each.

16-bit values are rounded where the plain torch form rounds them. At one row the arithmetic is nothing and every
kernel costs its launch, so fewer kernels are what counts.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from penstock.engine.torch.cuda import programs
from penstock.engine.torch.cuda.launch import launch


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum) of x and residual [M, D]; without a residual the sum is x itself."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x if residual is None else torch.empty_like(out)
    launch(
        programs.norm, (x.shape[0],), x, residual, weight, out, total, x.stride(0),
        0 if residual is None else residual.stride(0), x.shape[1], eps,
        WIDTH=triton.next_power_of_2(x.shape[1]), ADDS=residual is not None,
        IS_WIDE=weight.dtype is torch.float32 and x.dtype is not torch.float32,
    )  # fmt: skip
    return out, total


def gated(gate_up: Tensor, is_gelu: bool) -> Tensor:
    """gate_up [M, 2F], gates first -> [M, F]"""
    width = gate_up.shape[1] // 2
    out = gate_up.new_empty(gate_up.shape[0], width)
    each = min(1024, triton.next_power_of_2(width))
    grid = (gate_up.shape[0], triton.cdiv(width, each))
    launch(
        programs.gate_rows,
        grid,
        gate_up,
        out,
        gate_up.stride(0),
        width,
        WIDTH=each,
        IS_GELU=is_gelu,
    )
    return out


def norm_turn_(
    x: Tensor, weight: Tensor | None, eps: float, cos_sin: Tensor, positions: Tensor
) -> None:
    """x [T, H, D] in place, heads side by side; see kernels.qk_norm_rope_."""
    half = cos_sin.shape[1] // 2
    launch(
        programs.turn_heads, (x.shape[0], x.shape[1]), x, weight, cos_sin, positions, x.stride(0), eps,
        DIM=x.shape[2], DIMS=triton.next_power_of_2(x.shape[2]), HALF=half,
        HALVES=triton.next_power_of_2(half), IS_NORMED=weight is not None,
        IS_WIDE=weight is not None and weight.dtype is torch.float32 and x.dtype is not torch.float32,
    )  # fmt: skip
