"""One token for each row of logits: the likeliest, or one drawn through the inverse of the cumulated distribution.

Rows with limits (top-k, top-p, min-p) are drawn among the entries that these leave, the likeliest first, equal ones in
id order; the kernel selects them without sorting (source/limits.h). Others are drawn over all entries in id order: a
row is cut into runs of RUN entries: first the run is found, by the sums of runs, then the entry in it. No
entry of weight 0 is ever drawn. Where the kernel cannot be used torch computes the same; the two round differently, so
a draw that falls on the edge between two entries may go to either.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.torch.kernels import library as native

RUN = 128


class Limits(NamedTuple):
    """top_k of at least the vocabulary's size, top_p 1 and min_p 0 limit nothing."""

    top_k: int
    top_p: float
    min_p: float


def can_limit(logits: Tensor) -> bool:
    """Whether the kernel can draw from these, within limits."""
    return logits.is_cpu and logits.stride(-1) == 1 and native.available()


def pick_tokens(
    logits: Tensor,
    heat: Sequence[float] | None = None,
    chance: Sequence[float] | None = None,
    *,
    limits: Sequence[Limits] | None = None,
    isa: str | None = None,
) -> tuple[list[int], list[float]]:
    """(tokens, greatest logits) of fp32 logits [R, V]; rows of heat 0 take the likeliest, all without `heat`.

    `limits` of every row, where `can_limit`.

    A row whose greatest logit is not finite (NaN if any is) has a meaningless token.
    """
    assert (heat is None) == (chance is None), "what is drawn needs chance"
    if not can_limit(logits):
        assert limits is None, "torch draws without limits"
        return _pick_in_torch(logits, heat, chance)
    assert logits.dtype == torch.float32
    rows, width = (
        logits.shape
    )  # plain ctypes arrays: they are small, and array libraries are dear when not in cache
    ids, best = (ctypes.c_int64 * rows)(), (ctypes.c_float * rows)()
    heats = None if heat is None else (ctypes.c_float * rows)(*heat)
    chances = None if chance is None else (ctypes.c_double * rows)(*chance)
    told = None if limits is None else _columns(limits)
    call = native.DrawCall(
        logits.data_ptr(),
        None if heats is None else ctypes.addressof(heats),
        None if chances is None else ctypes.addressof(chances),
        *((None, None, None) if told is None else [ctypes.addressof(column) for column in told]),
        ctypes.addressof(ids),
        ctypes.addressof(best),
        rows,
        width,
        logits.stride(0),
    )
    library, table = native.pick(isa)
    library.draw(table, ctypes.byref(call), torch.get_num_threads())
    return ids[:], best[:]


def ban_(row: Tensor, allowed: NDArray[np.int32], *, isa: str | None = None) -> None:
    """Minus infinity for entries of fp32 logits [V] whose bit is 0: bit i % 32 of word i // 32."""
    width = len(row)
    assert 32 * len(allowed) >= width and allowed.flags.c_contiguous
    if not row.is_cpu or row.stride(0) != 1 or not native.available():
        bits = np.unpackbits(allowed.view(np.uint8), bitorder="little")[:width]
        row.masked_fill_(torch.from_numpy(bits == 0).to(row.device), -torch.inf)
        return
    assert row.dtype == torch.float32
    library, table = native.pick(isa)
    call = native.BanCall(row.data_ptr(), allowed.ctypes.data, width)
    library.ban(table, ctypes.byref(call), torch.get_num_threads())


def _columns(
    limits: Sequence[Limits],
) -> tuple[ctypes.Array[ctypes.c_int64] | ctypes.Array[ctypes.c_float], ...]:
    count = len(limits)
    return (
        (ctypes.c_int64 * count)(*[row.top_k for row in limits]),
        (ctypes.c_float * count)(*[row.top_p for row in limits]),
        (ctypes.c_float * count)(*[row.min_p for row in limits]),
    )


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
