"""Which rows of a step use which adapter, grouped so that few products do all of it.

Chunks lie one behind the other, those of single tokens together. A chunk of LONG rows or more is a group of its own.
Shorter ones that lie together are one group for each run of neighbouring slots: all its rows are multiplied with all
adapters of the run at once, and what a row got of adapters that are not its own is struck out. That reads each
adapter once, whatever the number of rows, which is what decides at decode; the products that are struck out cost
rows * adapters * rank, little beside the base's.

A step of few such rows on a CPU runs as recorded calls (recorded.py), in which a kernel adds what each row's adapter
does; those of one slot pass it together.

What a product adds is told by thread: each lane sets its step's rows before each piece of the forward.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LONG = 16
MOST_USERS = 32  # that the kernel takes; more of them are products of matrices
SlotOf = int | None


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Rows [start, stop) and slots [first, last). `strangers` [rows, slots, 1]: what is struck out; None: nothing."""

    start: int
    stop: int
    first: int
    last: int
    strangers: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Users:
    """int32 [U]: rows that use an adapter, and the slots they use; those of a slot lie together."""

    rows: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AdapterRows:
    """Of one step."""

    groups: tuple[Group, ...]
    users: Users | None = None  # None: too many for products row by row, or not on a CPU

    def enter(self) -> None:
        """From now on this thread's products add what these rows ask for."""
        HERE.groups = self.groups


class _Here(threading.local):
    groups: tuple[Group, ...] = ()


HERE = _Here()


def rows_of(
    slots: Sequence[SlotOf], query_start: Sequence[int], device: torch.device
) -> AdapterRows | None:
    """`slots` by chunk, None of those that use the base; None when all of them do."""
    groups: list[Group] = []
    short: list[tuple[int, SlotOf]] = []  # (row, slot) of chunks that lie together
    begin = 0
    for at, slot in enumerate(slots):
        start, stop = query_start[at], query_start[at + 1]
        if stop - start < LONG:
            if not short:
                begin = start
            short += [(row, slot) for row in range(start, stop)]
            continue
        groups += _together(begin, [one for _, one in short], device)
        short.clear()
        if slot is not None:
            groups.append(Group(start, stop, slot, slot + 1))
    groups += _together(begin, [one for _, one in short], device)
    if not groups:
        return None
    return AdapterRows(tuple(groups), _users(slots, query_start) if device.type == "cpu" else None)


def _users(slots: Sequence[SlotOf], query_start: Sequence[int]) -> Users | None:
    found = [
        (slot, row)
        for at, slot in enumerate(slots)
        if slot is not None
        for row in range(query_start[at], query_start[at + 1])
    ]
    if len(found) > MOST_USERS:
        return None
    told = torch.tensor(sorted(found), dtype=torch.int32).T.contiguous()
    return Users(rows=told[1], slots=told[0])


def _together(begin: int, slots: list[SlotOf], device: torch.device) -> list[Group]:
    """Groups of short chunks, without base rows at either end."""
    users = [at for at, slot in enumerate(slots) if slot is not None]
    if not users:
        return []
    slots = slots[users[0] : users[-1] + 1]
    start = begin + users[0]
    found = []
    for first, last in _runs(sorted({slot for slot in slots if slot is not None})):
        wanted = [slot if slot is not None and first <= slot < last else None for slot in slots]
        strangers = None
        if last - first > 1 or None in wanted:
            own = torch.tensor([slot if slot is not None else last for slot in wanted])
            strangers = (own[:, None] != torch.arange(first, last))[..., None]
            strangers = strangers if device.type == "cpu" else strangers.to(device)
        found.append(Group(start, start + len(slots), first, last, strangers))
    return found


def _runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """[first, last) of each run of neighbouring numbers."""
    found: list[tuple[int, int]] = []
    for slot in slots:
        if found and found[-1][1] == slot:
            found[-1] = (found[-1][0], slot + 1)
        else:
            found.append((slot, slot + 1))
    return found
