"""Copies runs of blocks between the KV arena and one in host memory, beside the steps.

    loop's thread     begin: notes what a copy touches, and which earlier copies it has to wait for
    worker threads    wait for these, copy, tell the loop, and set the copy's own event
    lane's thread     waits for the events of copies that touch blocks new to its plan, and of those plans wait for

A worker never waits for a copy that was begun later, and copies are taken up in the order in which they were begun, so
somebody can always go on. On a CPU a copy is numpy's, which lets other threads run meanwhile. On a GPU host memory is
pinned and has all pieces of a block side by side, so that a run of blocks is one copy over the bus: blocks are brought
together on the GPU first (card_memory.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from penstock.core.plans import Decodes, Plan, Transfer
from penstock.engine.torch.card_memory import CardMemory

GROUP_BYTES = 64 << 20  # brought together at once
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Copy:
    device: set[int]
    host: set[int]
    is_sync: bool
    done: threading.Event = field(default_factory=threading.Event)


class Mover:
    """`arena` [pieces, blocks, ...]: a run of blocks is one stretch of memory in each piece.

    `tell` is called by workers.
    """

    def __init__(
        self,
        arena: Tensor,
        host_blocks: int,
        *,
        threads: int,
        tell: Callable[[int], None],
        host: Tensor | None = None,
    ) -> None:
        """`host`: memory for the blocks; None: it is taken here."""
        self._arena, self._tell = arena, tell
        self._card = CardMemory(arena) if arena.is_cuda else None
        if host is None and self._card is None:
            shape = (arena.shape[0], host_blocks, *arena.shape[2:])
            host = torch.empty(shape, dtype=arena.dtype)
        self.host = host_of(arena, host_blocks) if host is None else host
        self._copies: list[_Copy] = []
        self._workers = ThreadPoolExecutor(threads, thread_name_prefix="penstock-mover")

    @property
    def num_bytes(self) -> int:
        return self.host.numel() * self.host.element_size()

    def begin(self, transfer: Transfer) -> None:
        """On the loop's thread."""
        device = set(chain.from_iterable(range(d, d + n) for d, _, n in transfer.runs))
        host = set(chain.from_iterable(range(h, h + n) for _, h, n in transfer.runs))
        copy = _Copy(device, host, transfer.is_sync)
        before = [
            other.done
            for other in self._under_way()
            if not (other.device.isdisjoint(device) and other.host.isdisjoint(host))
        ]
        self._copies.append(copy)
        self._workers.submit(self._run, transfer, copy, before)

    def waits_of(self, plan: Plan) -> Sequence[threading.Event]:
        """What a plan that is launched now has to wait for. On the loop's thread."""
        copies = self._under_way()
        if not copies:
            return ()
        work = plan.work
        fresh: set[int] = set()
        if isinstance(work, Decodes):
            fresh.update(chain.from_iterable(work.fresh.values()))
            work = work.others
        fresh.update(chain.from_iterable([one.blocks for one in work]))
        return [copy.done for copy in copies if copy.is_sync or not copy.device.isdisjoint(fresh)]

    def close(self) -> None:
        """Return when what was begun has been copied."""
        self._workers.shutdown(wait=True)

    def _under_way(self) -> list[_Copy]:
        self._copies = [copy for copy in self._copies if not copy.done.is_set()]
        return self._copies

    def _run(self, transfer: Transfer, copy: _Copy, before: Sequence[threading.Event]) -> None:
        try:
            for event in before:
                event.wait()
            if self._card is not None:
                copy_packed(self._card, self.host, transfer)
            else:
                copy_runs(_bytes(self._arena), _bytes(self.host), transfer)
            self._tell(transfer.id)
        except Exception:  # the pool would keep it to itself
            logger.exception("blocks could not be copied; who waits for them is not told")
            raise
        finally:
            copy.done.set()


Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def host_of(arena: Tensor, host_blocks: int) -> Tensor:
    """[pieces, blocks, ...], pinned, a block's pieces side by side."""
    shape = (host_blocks, arena.shape[0], *arena.shape[2:])
    return torch.empty(shape, dtype=arena.dtype, pin_memory=arena.is_cuda).transpose(0, 1)


def copy_packed(card: CardMemory, host: Tensor, transfer: Transfer) -> None:
    """One copy a run, of at most GROUP_BYTES."""
    pieces, _, size = card.shape
    most = max(1, GROUP_BYTES // (pieces * size))
    for first, start, count in transfer.runs:
        for at in range(0, count, most):
            few = min(most, count - at)
            blocks = range(first + at, first + at + few)
            rows = host[:, start + at : start + at + few].transpose(0, 1).flatten(2)
            if transfer.is_out:
                card.fetch_rows(blocks, rows)
            else:
                card.store_rows(blocks, rows)


def _bytes(arena: Tensor) -> Bytes:
    found: Bytes = arena.view(torch.uint8).numpy()
    return found


def copy_runs(device: Bytes, host: Bytes, transfer: Transfer) -> None:
    """Piece by piece, run by run: one copy of consecutive memory each."""
    for first, start, count in transfer.runs:
        ours, theirs = slice(first, first + count), slice(start, start + count)
        for there, here in zip(device, host, strict=True):
            if transfer.is_out:
                here[theirs] = there[ours]
            else:
                there[ours] = here[theirs]
