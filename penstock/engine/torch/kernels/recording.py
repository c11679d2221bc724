"""The small operations of fused.py as recorded calls (program.py), or as Python where shapes do not fit the kernels."""

from __future__ import annotations

from torch import Tensor

from penstock.engine.torch.kernels import fused
from penstock.engine.torch.kernels import library as native
from penstock.engine.torch.kernels.program import Recorder, Turns

Norm = tuple[Tensor, float]  # weight, epsilon


def record_norm(
    into: Recorder, x: Tensor, residual: Tensor | None, norm: Norm, out: Tensor
) -> None:
    """out = norm(x), or of x + residual, which then becomes the new residual. `out` may be x."""
    weight, eps = norm
    if fused.takes_rows(x, x.shape[1], weight):
        call = fused.norm_call(x, residual, weight, (out, residual), eps)
        into.call(into.library.norm, call, {"num_rows": into.ROWS})
        return

    def run() -> None:
        rows = into.now.rows
        if residual is None:
            out[:rows].copy_(fused.rms_norm(x[:rows], weight, eps))
        else:
            normed, total = fused.add_rms_norm(x[:rows], residual[:rows], weight, eps)
            out[:rows].copy_(normed)
            residual[:rows].copy_(total)

    into.python(run)


def record_rope(
    into: Recorder,
    qk: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor, float] | None,
    table: Turns,
) -> None:
    """Turns q and k in place; each step gives the address of its cosines and sines under the key `table`."""
    q, k = qk
    cos_sin = table.upto(1)
    if fused.takes_rope(q, k, norm, cos_sin):
        into.turns.add(table)
        call = fused.rope_call(q, k, norm, cos_sin, into.now.positions)
        moving = {"cos_sin": table, "positions": "positions", "num_tokens": into.ROWS}
        into.call(into.library.rope, call, moving)
        return

    def run() -> None:
        rows, now = into.now.rows, into.now
        turns = table.upto(now.max_context)
        fused.qk_norm_rope_(q[:rows], k[:rows], norm, turns, now.positions)

    into.python(run)


MOST_RANK = 256  # of adapters, as in source/adapt.h
USERS, USER_ROWS, USER_SLOTS = (
    "users",
    "user_rows",
    "user_slots",
)  # of adapters, as each step has them


def record_adapter(into: Recorder, x: Tensor, factors: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Adds to out what the adapters of a step's users add. Factors: fp32 [slots, rank, in], [slots, rank, out]."""
    down, up = factors
    assert (
        down.stride(1) == down.shape[2] and up.is_contiguous() and x.stride(1) == out.stride(1) == 1
    )
    into.tensors += factors
    nothing = into.now.positions
    call = native.AdaptCall(
        x.data_ptr(),
        out.data_ptr(),
        down.data_ptr(),
        up.data_ptr(),
        nothing.data_ptr(),
        nothing.data_ptr(),
        0,
        down.shape[2],
        up.shape[2],
        down.shape[1],
        x.stride(0),
        out.stride(0),
        down.stride(0),
        up.stride(0),
        native.is_bf16(x),
    )
    moving = {"num_users": USERS, "rows": USER_ROWS, "slots": USER_SLOTS}
    into.call(into.library.adapt, call, moving)


def record_gate(into: Recorder, gate_up: Tensor, out: Tensor, is_gelu: bool) -> None:
    if fused.takes_rows(gate_up, out.shape[1]):
        call = fused.gate_call(gate_up, out, is_gelu)
        into.call(into.library.gate, call, {"num_rows": into.ROWS})
        return
    plain = fused.gelu_mul if is_gelu else fused.silu_mul

    def run() -> None:
        rows = into.now.rows
        out[:rows].copy_(plain(gate_up[:rows]))

    into.python(run)
