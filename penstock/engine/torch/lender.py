"""The creditor's side of DistAttention: keeps blocks for other replicas' requests, and attends over them when asked.

A loan is a few blocks of this replica's memory that one request of another replica owns; the ledger counts them as
taken. Its debtor opens a line (net.lines), names the loan, and says, in this order as often as it likes:

    COPY    blocks of another replica's memory into blocks of the loan; answered when they are here
    WHERE   the blocks of the loan are, in whose memory: for whoever copies them elsewhere
    TABLE   which blocks of the loan the questions that follow are about
    ATTEND  a layer and queries [T, H, D]; answered by out [T, H, D] and lse [T, H] (float32) over those blocks

All of them lie before every query, so nothing is masked. Each line has a thread beside the lane, over the same cache:
the blocks of a loan are written by nobody else. Blocks are named by their place in the loan, so a debtor reads and
writes what it was lent and nothing else. The last block of a loan takes the keys and values that the backend's call
wants to store, which nobody reads.
"""

from __future__ import annotations

import copy
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from torch import Tensor

from penstock.core.errors import PenstockError
from penstock.engine.torch.cores import compute_with
from penstock.engine.torch.ports import AttentionBackend, Mask, StepMeta
from penstock.net.blocks import Region, Runs, copy_runs
from penstock.net.kv_shared import opened
from penstock.net.lines import Line, Listener

HELLO, COPY, TABLE, ATTEND, FAILED, WHERE = range(6)
QUESTION = struct.Struct("<iiiidd")  # layer, rows, heads, head size, scale, cap
_copies = msgspec.msgpack.Decoder(tuple[str, list[tuple[int, int, int]]])


@dataclass(slots=True)
class _Loan:
    blocks: list[int]
    guard: threading.Lock = field(default_factory=threading.Lock)  # held while blocks are written
    is_over: bool = False
    line: Line | None = None


@dataclass(slots=True)
class _Asked:
    """What one line has said so far."""

    loan: _Loan
    blocks: Tensor
    spare: int
    meta: StepMeta | None = None  # of the questions so far, which layers share


class Lender:
    """`backend` and its `region` are the replica's own."""

    def __init__(
        self, backend: AttentionBackend, region: Region, *, kv_heads: int, block_size: int,
        threads: int | None = None, latent: int | None = None, home: str = "",
    ) -> None:  # fmt: skip
        """`home`: where others read `region`."""
        self._home = home
        self._backend = copy.copy(backend)  # the same cache
        self._backend.want_lse(True)
        self._region, self._kv_heads, self._size = region, kv_heads, block_size
        self._threads, self._latent = threads, latent
        self._loans: dict[int, _Loan] = {}
        self._listener: Listener | None = None

    def lend(self, loan: int, blocks: Sequence[int]) -> str:
        """Keep these for a debtor, who finds them here: the address."""
        if self._listener is None:
            self._listener = Listener(self._serve)
        self._loans[loan] = _Loan(list(blocks))
        return self._listener.address

    def give_back(self, loan: int, num_blocks: int | None = None) -> None:
        """When this returns, nobody writes into its last `num_blocks` (None: any of its) blocks any more."""
        found = self._loans.get(loan)
        if found is not None and num_blocks is not None:
            with found.guard:
                del found.blocks[-1 - num_blocks : -1]
        elif found is not None:
            del self._loans[loan]
            with found.guard:
                found.is_over = True
            if found.line is not None:
                found.line.close()

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    # ---------------------------------------------------------------- in the threads of lines

    def _serve(self, line: Line) -> None:
        if self._threads is not None:
            compute_with(self._threads)
        _, body = line.hear()
        loan = self._loans.get(int.from_bytes(body, "little"))
        if loan is None:
            line.send(FAILED, b"there is no such loan")
            return
        loan.line = line
        line.send(HELLO)
        asked = _Asked(loan, torch.zeros(1, 0, dtype=torch.int32), loan.blocks[-1])
        with torch.inference_mode():
            while not loan.is_over:
                kind, body = line.hear()
                if kind == COPY:
                    self._copy(line, asked, body)
                elif kind == WHERE:
                    line.send(WHERE, msgspec.msgpack.encode((self._home, loan.blocks)))
                elif kind == TABLE:
                    chosen = np.array(loan.blocks, np.int32)[np.frombuffer(body, np.int32)]
                    asked.blocks, asked.meta = torch.from_numpy(chosen)[None], None
                else:
                    line.send(ATTEND, *self._attend(asked, body))

    def _copy(self, line: Line, asked: _Asked, body: memoryview) -> None:
        loan = asked.loan
        address, told = _copies.decode(body)
        try:
            there = opened(address)
            with loan.guard:
                if not loan.is_over:
                    copy_runs(there, self._region, _in_loan(told, loan.blocks))
        except PenstockError as error:
            line.send(FAILED, error.message.encode())
            return
        line.send(COPY)

    def _attend(self, asked: _Asked, body: memoryview) -> tuple[memoryview, memoryview]:
        layer, rows, heads, dim, scale, cap = QUESTION.unpack_from(body)
        dtype = self._query_dtype(body.nbytes - QUESTION.size, rows * heads * dim)
        told = torch.frombuffer(body, dtype=dtype, offset=QUESTION.size)
        q = told.view(rows, heads, dim)
        unread = q.new_zeros(rows, self._kv_heads, dim)
        meta = asked.meta
        if meta is None or meta.max_query != rows:
            meta = asked.meta = self._meta(asked, rows)
        mask = Mask(kind="full", cap=None if cap == float("inf") else cap)
        values = unread if self._latent is None else unread[..., : self._latent]
        out, lse = self._backend(layer, q, unread, values, meta, mask, scale)
        assert lse is not None
        return bytes_of(out), bytes_of(lse)

    def _meta(self, asked: _Asked, rows: int) -> StepMeta:
        count = asked.blocks.shape[1] * self._size
        return StepMeta(
            query_start=torch.tensor([0, rows], dtype=torch.int32),
            context=torch.tensor([count], dtype=torch.int32),
            block_table=asked.blocks,
            slots=torch.full((rows,), asked.spare * self._size),
            max_query=rows,
            max_context=count,
        )

    def _query_dtype(self, num_bytes: int, count: int) -> torch.dtype:
        return torch.bfloat16 if num_bytes == 2 * count else torch.float32


def bytes_of(x: Tensor) -> memoryview:
    """Without a copy where x is contiguous."""
    flat: Region = x.contiguous().flatten().view(torch.uint8).numpy()
    return flat.data


def _in_loan(told: Runs, blocks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs (block there, place in the loan, count) as runs onto our blocks, which may lie apart."""
    return [
        (first + at, blocks[place + at], 1) for first, place, count in told for at in range(count)
    ]
