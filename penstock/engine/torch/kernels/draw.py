"""One token for each row of logits: the likeliest, or one drawn through the inverse of the cumulated distribution.

A row is cut into runs of RUN entries in id order: first the run is found, by the sums of runs, then the entry in it. No
entry of weight 0 is ever drawn. Where the kernel cannot be used torch computes the same; the two round differently, so
a draw that falls on the edge between two entries may go to either.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.torch.kernels import library as native

RUN = 128


def pick_tokens(
    logits: Tensor,
    heat: Sequence[float] | None = None,
    chance: Sequence[float] | None = None,
    *,
    isa: str | None = None,
) -> tuple[list[int], list[float]]:
    """(tokens, greatest logits) of fp32 logits [R, V]; rows of heat 0 take the likeliest, all without `heat`.

    A row whose greatest logit is not finite (NaN if any is) has a meaningless token.
    """
    assert (heat is None) == (chance is None), "what is drawn needs chance"
    if not logits.is_cpu or logits.stride(-1) != 1 or not native.available():
        return _pick_in_torch(logits, heat, chance)
    assert logits.dtype == torch.float32
    rows, width = (
        logits.shape
    )  # plain ctypes arrays: they are small, and array libraries are dear when not in cache
    ids, best = (ctypes.c_int64 * rows)(), (ctypes.c_float * rows)()
    heats = None if heat is None else (ctypes.c_float * rows)(*heat)
    chances = None if chance is None else (ctypes.c_double * rows)(*chance)
    call = native.DrawCall(
        logits.data_ptr(),
        None if heats is None else ctypes.addressof(heats),
        None if chances is None else ctypes.addressof(chances),
        ctypes.addressof(ids),
        ctypes.addressof(best),
        rows,
        width,
        logits.stride(0),
    )
    library, table = native.pick(isa)
    library.draw(table, ctypes.byref(call), torch.get_num_threads())
    return ids[:], best[:]


def _pick_in_torch(
    logits: Tensor, heat: Sequence[float] | None, chance: Sequence[float] | None
) -> tuple[list[int], list[float]]:
    best, ids = logits.max(-1)
    if heat is not None and chance is not None and any(heat):
        warm = [row for row, each in enumerate(heat) if each]
        where = torch.tensor(warm, device=logits.device)
        scale = torch.tensor([heat[row] for row in warm], device=logits.device)
        goal = torch.tensor([chance[row] for row in warm], device=logits.device, dtype=torch.double)
        weights = (logits[where] - best[where, None]).div_(scale[:, None]).exp_()
        ids[where] = _draw(weights, goal)
    return ids.tolist(), best.tolist()


def _draw(weights: Tensor, chance: Tensor) -> Tensor:
    """Entries of unnormalised weights [R, V]."""
    size = weights.shape[1]
    if short := -size % RUN:
        weights = F.pad(weights, (0, short))
    runs = weights.unflatten(1, (-1, RUN))  # type: ignore[no-untyped-call]
    edges = runs.sum(-1).double().cumsum(-1)
    goal = chance[:, None] * edges[:, -1:]
    run = entry_at(edges, goal)[:, None]
    inside = runs.gather(1, run[:, :, None].expand(-1, 1, RUN)).squeeze(1).double().cumsum(-1)
    before = F.pad(edges, (1, 0)).gather(1, run)
    return ((run * RUN).squeeze(1) + entry_at(inside, goal - before)).clamp_(max=size - 1)


def entry_at(edges: Tensor, goal: Tensor) -> Tensor:
    """Where in the running sums `edges` [R, N] each goal [R, 1] falls."""
    found = torch.searchsorted(edges, goal.contiguous(), right=True)
    # rounding may put the goal on the last edge: step back to the entry that reaches it
    last = torch.searchsorted(edges, edges[:, -1:].contiguous())
    # a row that is not finite has no such entry: any will do, the row is told as broken
    return torch.minimum(found, last).clamp_(max=edges.shape[1] - 1).squeeze(1)
