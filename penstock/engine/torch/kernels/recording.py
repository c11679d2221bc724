"""The small operations of fused.py as recorded calls (program.py), or as Python where shapes do not fit the kernels."""

from __future__ import annotations

from torch import Tensor

from penstock.engine.torch.kernels import fused
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
