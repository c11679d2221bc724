"""The small operations between matrix products, each in one pass.

Every function computes the same with torch operations when the kernels are not available, when gradients are wanted
or when a shape is not a multiple of 16. bfloat16 values are rounded exactly where the plain torch form rounds them.

A norm's weight may be float32 where its input is not: then it multiplies before anything is rounded.

`cos_sin` is float32 [positions, R]: R / 2 cosines, then R / 2 sines. The first R dimensions of each head are turned,
dimension i together with i + R / 2; the rest stays. Positions must lie inside the table: that is not checked.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.torch.kernels import library as native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] scaled to a root mean square of one, times weight [D]."""
    if x.shape[-1] % 16 or not _is_fast(x) or not _fits(x, weight):
        if x.is_cuda and has_triton():
            normed: Tensor = _triton().rms_norm(_rows(x), None, weight, eps)[0]
            return normed.view(x.shape)
        return _norm_in_torch(x, weight, eps)
    rows = _rows(x)
    out = torch.empty_like(rows)
    _norm(rows, None, weight, (out, None), eps)
    return out.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum) of x and residual [..., D]."""
    assert x.shape == residual.shape
    if x.shape[-1] % 16 or not _is_fast(x, residual) or not _fits(x, weight):
        if x.is_cuda and has_triton():
            out, total = _triton().rms_norm(_rows(x), _rows(residual), weight, eps)
            return out.view(x.shape), total.view(x.shape)
        total = x + residual
        return _norm_in_torch(total, weight, eps), total
    rows = _rows(x)
    out, total = torch.empty_like(rows), torch.empty_like(rows)
    _norm(rows, _rows(residual), weight, (out, total), eps)
    return out.view(x.shape), total.view(x.shape)


def rope_(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    """Turns q [T, H, D] and k [T, K, D] in place by their positions int64 [T]."""
    qk_norm_rope_(q, k, None, cos_sin, positions)


def qk_norm_rope_(
    q: Tensor,
    k: Tensor,
    norm: tuple[Tensor, Tensor, float] | None,
    cos_sin: Tensor,
    positions: Tensor,
) -> None:
    """As `rope_`, after an RMS norm of each head: norm is (weight of q [D], weight of k [D], eps)."""
    if q.is_cuda and has_triton() and _heads_touch(q) and _heads_touch(k):
        q_weight, k_weight, eps = norm if norm is not None else (None, None, 0.0)
        _triton().norm_turn_(q, q_weight, eps, cos_sin, positions)
        _triton().norm_turn_(k, k_weight, eps, cos_sin, positions)
        return
    if not takes_rope(q, k, norm, cos_sin):
        q_weight, k_weight, eps = norm if norm is not None else (None, None, 0.0)
        _norm_rope_in_torch_(q, q_weight, eps, cos_sin, positions)
        _norm_rope_in_torch_(k, k_weight, eps, cos_sin, positions)
        return
    assert positions.dtype == torch.int64 and positions.is_contiguous() and cos_sin.is_contiguous()
    call = rope_call(q, k, norm, cos_sin, positions)
    library, table = native.pick(None)
    library.rope(table, ctypes.byref(call), torch.get_num_threads())


def takes_rope(
    q: Tensor, k: Tensor, norm: tuple[Tensor, Tensor, float] | None, cos_sin: Tensor
) -> bool:
    """Whether the kernel takes these shapes and types."""
    if cos_sin.shape[1] % 32 or q.shape[2] % 16 or cos_sin.dtype != torch.float32:
        return False
    if not (_heads_touch(q) and _heads_touch(k) and _is_fast(q, k)):
        return False
    return norm is None or _fits(q, *norm[:2])


def takes_rows(x: Tensor, width: int, *weights: Tensor) -> bool:
    """Whether the kernels take rows [M, ..] in parts of `width`, normed by `weights`."""
    return width % 16 == 0 and _is_fast(x) and _fits(x, *weights)


def rope_call(
    q: Tensor,
    k: Tensor,
    norm: tuple[Tensor, Tensor, float] | None,
    cos_sin: Tensor,
    positions: Tensor,
) -> native.RopeCall:
    q_weight, k_weight, eps = norm if norm is not None else (None, None, 0.0)
    return native.RopeCall(
        q.data_ptr(),
        k.data_ptr(),
        native.address(q_weight),
        native.address(k_weight),
        cos_sin.data_ptr(),
        positions.data_ptr(),
        q.stride(0),
        k.stride(0),
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        cos_sin.shape[1],
        eps,
        native.is_bf16(q),
        q_weight is not None and q_weight.dtype is torch.float32,
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2F], gates first -> silu(gate) * up [..., F]."""
    return _gate(gate_up, False)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """The same with GELU in its tanh form."""
    return _gate(gate_up, True)


def _gate(gate_up: Tensor, is_gelu: bool) -> Tensor:
    width = gate_up.shape[-1] // 2
    if width % 16 or not _is_fast(gate_up):
        if gate_up.is_cuda and has_triton():
            gated: Tensor = _triton().gated(_rows(gate_up), is_gelu)
            return gated.view(*gate_up.shape[:-1], width)
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.gelu(gate, approximate="tanh") if is_gelu else F.silu(gate)) * up
    rows = _rows(gate_up)
    out = rows.new_empty(rows.shape[0], width)
    call = gate_call(rows, out, is_gelu)
    library, table = native.pick(None)
    library.gate(table, ctypes.byref(call), torch.get_num_threads())
    return out.view(*gate_up.shape[:-1], width)


def gate_call(gate_up: Tensor, out: Tensor, is_gelu: bool) -> native.GateCall:
    return native.GateCall(
        gate_up.data_ptr(),
        out.data_ptr(),
        gate_up.shape[0],
        out.shape[1],
        gate_up.stride(0),
        native.is_bf16(gate_up),
        is_gelu,
    )


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: tuple[Tensor, Tensor | None],
    eps: float,
) -> None:
    call = norm_call(x, residual, weight, out, eps)
    library, table = native.pick(None)
    library.norm(table, ctypes.byref(call), torch.get_num_threads())


def norm_call(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: tuple[Tensor, Tensor | None],
    eps: float,
) -> native.NormCall:
    assert weight.shape == x.shape[1:]
    return native.NormCall(
        x.data_ptr(),
        native.address(residual),
        weight.data_ptr(),
        out[0].data_ptr(),
        native.address(out[1]),
        x.shape[0],
        x.shape[1],
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        eps,
        native.is_bf16(x),
        weight.dtype is torch.float32,
    )


def _is_fast(first: Tensor, *others: Tensor) -> bool:
    """Called before every small operation, so written to cost little."""
    dtype, gradients = first.dtype, torch.is_grad_enabled()
    if dtype is not torch.float32 and dtype is not torch.bfloat16:
        return False
    for x in (first, *others):
        if x.dtype is not dtype or not x.is_cpu or x.stride(-1) != 1:
            return False
        if gradients and x.requires_grad:
            return False
    return native.available()


def _fits(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels take these weights of a norm of x."""
    gradients = torch.is_grad_enabled()
    for weight in weights:
        if weight.dtype is not x.dtype and weight.dtype is not torch.float32:
            return False
        if not weight.is_cpu or weight.stride(-1) != 1 or (gradients and weight.requires_grad):
            return False
    return True


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _heads_touch(x: Tensor) -> bool:
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


@cache
def has_triton() -> bool:
    """It comes with torch's CUDA builds."""
    return find_spec("triton") is not None


@cache
def _triton() -> ModuleType:
    return import_module("penstock.engine.torch.cuda.fused")


def _norm_in_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight.dtype is torch.float32:
        return (wide * weight).to(x.dtype)
    return wide.to(x.dtype) * weight


def _norm_rope_in_torch_(
    x: Tensor, weight: Tensor | None, eps: float, cos_sin: Tensor, positions: Tensor
) -> None:
    if weight is not None:
        x.copy_(_norm_in_torch(x, weight, eps))
    cos, sin = cos_sin[positions].to(x.dtype)[:, None].chunk(2, dim=-1)
    first, second = x[..., : cos_sin.shape[1]].chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    x[..., : cos_sin.shape[1]] = turned
