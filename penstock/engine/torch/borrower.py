"""The debtor's side of DistAttention: a request whose first blocks lie in other replicas' memory.

Blocks that were lent are numbered behind our own: numbers from `num_blocks` on in a block table say that those
positions are away, and with whom. A step that holds such a job attends in two parts. Queries of the job go to each
creditor, who attends over what it keeps (lender.py), while here the rest is attended over by a table of what is left;
keys carry their rotation already, so positions need not be told, and all that is away lies before every query. Then the
parts are merged (combine).

Keys and values of new positions are stored here, always. Whole blocks that will not change any more are taken over by
the creditor (`spill`), after which they are free here. They come back, or go to another creditor, by `relocate`:
whoever is to have them reads them where they are.

A creditor that is lost ends the jobs that it kept blocks for, each with an error, and no others of their step.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from penstock.core.errors import ReplicaLost, StepFailed
from penstock.core.plans import Sampled, Work
from penstock.engine.torch.decoder import StepInput
from penstock.engine.torch.kernels.combine import combine
from penstock.engine.torch.lender import (
    ATTEND,
    COPY,
    FAILED,
    HELLO,
    QUESTION,
    TABLE,
    WHERE,
    bytes_of,
)
from penstock.engine.torch.ports import AttentionBackend, Mask, StepMeta
from penstock.net.blocks import Region, copy_runs
from penstock.net.kv_shared import opened
from penstock.net.lines import Line, call

_where = msgspec.msgpack.Decoder(tuple[str, list[int]])
LOST = "a replica that kept a part of this request's context is gone; send the request again"


@dataclass(slots=True)
class _Debt:
    """A loan as its debtor has it: `count` blocks, numbered from `first` on."""

    loan: int
    first: int
    count: int
    address: str
    line: Line | None = None
    table: bytes = b""  # as it was said last

    def connected(self) -> Line:
        """Raises ReplicaLost."""
        if self.line is None:
            line = call(self.address)
            line.send(HELLO, self.loan.to_bytes(8, "little"))
            _answer(line, HELLO)
            self.line = line
        return self.line


def _answer(line: Line, kind: int) -> memoryview:
    told, body = line.hear()
    if told == FAILED:
        raise ReplicaLost(bytes(body).decode())
    assert told == kind, "answers come in the order of the questions"
    return body


@dataclass(slots=True)
class _Away:
    """A chunk of this step: where its rows are, and who keeps what of its context."""

    seq: int
    rows: slice
    tables: list[tuple[_Debt, bytes]]
    lost: str | None = None

    def begin(self) -> None:
        try:
            for debt, table in self.tables:
                line = debt.connected()
                if debt.table != table:
                    debt.table = table
                    line.send(TABLE, table)
        except ReplicaLost:
            self.lost = LOST

    def ask(self, layer: int, q: Tensor, mask: Mask, scale: float) -> None:
        if self.lost is not None:
            return
        cap = float("inf") if mask.cap is None else mask.cap
        mine = q[self.rows]
        question = QUESTION.pack(layer, *mine.shape, scale, cap)
        try:
            for debt, _ in self.tables:
                debt.connected().send(ATTEND, question, bytes_of(mine))
        except ReplicaLost:
            self.lost = LOST

    def merge(self, out: Tensor, lse: Tensor) -> None:
        """Into the rows of the step's result."""
        ours, weights = out[self.rows], lse[self.rows]
        parts = [(ours, weights)]
        if self.lost is None:
            try:
                parts += [self._hear(debt, ours, weights) for debt, _ in self.tables]
            except ReplicaLost:
                self.lost = LOST
                return
            found, total = combine(parts)
            ours.copy_(found)
            weights.copy_(total)

    def _hear(self, debt: _Debt, ours: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        body = _answer(debt.connected(), ATTEND)
        split = ours.nbytes
        out = torch.frombuffer(body, dtype=ours.dtype, count=ours.numel())
        lse = torch.frombuffer(body, dtype=torch.float32, offset=split)
        return out.view_as(ours), lse.view_as(weights)


class SplitAttention:
    """The AttentionBackend of one step that has jobs whose context is in parts."""

    name = "split"

    def __init__(self, local: AttentionBackend, away: Sequence[_Away]) -> None:
        self._local, self._away = local, away
        for each in away:
            each.begin()

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, meta: StepMeta, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        assert mask.window is None, "who borrows sees all of its context"
        for each in self._away:
            each.ask(layer, q, mask, scale)
        out, lse = self._local(layer, q, k, v, meta, mask, scale)
        assert lse is not None
        for each in self._away:
            each.merge(out, lse)
        return out, lse

    def want_lse(self, wanted: bool) -> None:
        """It always has it."""

    def copy_blocks(self, pairs: Tensor) -> None:
        self._local.copy_blocks(pairs)

    @property
    def num_bytes(self) -> int:
        return self._local.num_bytes

    def judged(self, outputs: Sequence[Sampled]) -> list[Sampled]:
        """What came of the step: of jobs whose creditors were lost, that."""
        lost = {each.seq: each.lost for each in self._away if each.lost is not None}
        kept = [output for output in outputs if output.seq not in lost]
        return kept + [Sampled(seq, 0, error=why) for seq, why in lost.items()]


class Borrower:
    """`region`: our own memory, and `home` its address, for creditors."""

    def __init__(
        self,
        backend: AttentionBackend,
        region: Region,
        *,
        num_blocks: int,
        block_size: int,
        home: str,
    ) -> None:
        self._region = region
        self._local = copy.copy(backend)  # the same cache, and lse for those who split
        self._local.want_lse(True)
        self._num_blocks, self._size, self._home = num_blocks, block_size, home
        self._debts: dict[int, _Debt] = {}

    def borrow(self, loan: int, first: int, count: int, address: str) -> None:
        self._debts[loan] = _Debt(loan, first, count, address)

    def give_back(self, loan: int) -> None:
        debt = self._debts.pop(loan, None)
        if debt is not None and debt.line is not None:
            debt.line.close()

    def spill(
        self, runs: Sequence[tuple[int, int, int]], tell: Callable[[str | None], None]
    ) -> None:
        """Runs of (own block, number of the lent block, count) go to whom they were lent by; `tell` hears why not,
        from a thread, when all are there.
        """

        def work() -> None:
            try:
                for debt in list(self._debts.values()):
                    mine = [run for run in runs if 0 <= run[1] - debt.first < debt.count]
                    if mine:
                        self._hand_over(debt, mine)
            except ReplicaLost:
                tell(LOST)
            else:
                tell(None)

        threading.Thread(target=work, name="penstock-spill", daemon=True).start()

    def relocate(
        self, runs: Sequence[tuple[int, int, int]], tell: Callable[[str | None], None]
    ) -> None:
        """Runs of (number of a lent block, own block or number of another, count) go there; `tell` as in `spill`."""

        def work() -> None:
            try:
                for debt in list(self._debts.values()):
                    mine = [run for run in runs if 0 <= run[0] - debt.first < debt.count]
                    if mine:
                        self._bring(debt, mine)
            except ReplicaLost:
                tell(LOST)
            else:
                tell(None)

        threading.Thread(target=work, name="penstock-relocate", daemon=True).start()

    def _bring(self, debt: _Debt, runs: Sequence[tuple[int, int, int]]) -> None:
        """Out of one creditor's memory."""
        line = debt.connected()
        line.send(WHERE)
        address, blocks = _where.decode(_answer(line, WHERE))
        told = [
            (blocks[number - debt.first + at], target + at, 1)
            for number, target, count in runs
            for at in range(count)
        ]
        ours = [run for run in told if run[1] < self._num_blocks]
        if ours:
            copy_runs(opened(address), self._region, ours)
        for other in list(self._debts.values()):
            theirs = [
                (block, target - other.first, 1)
                for block, target, _ in told
                if 0 <= target - other.first < other.count
            ]
            if theirs:
                there = other.connected()
                there.send(COPY, msgspec.msgpack.encode((address, theirs)))
                _answer(there, COPY)

    def _hand_over(self, debt: _Debt, runs: Sequence[tuple[int, int, int]]) -> None:
        told = [(block, number - debt.first, count) for block, number, count in runs]
        line = debt.connected()
        line.send(COPY, msgspec.msgpack.encode((self._home, told)))
        _answer(line, COPY)

    def split(
        self, step: StepInput, work: Sequence[Work], *, is_layered: bool
    ) -> SplitAttention | None:
        """None for a step whose jobs have all they need here; else how it attends. Changes `step.meta`.

        Raises StepFailed for steps that cannot be split.
        """
        if not self._debts:
            return None
        meta = step.meta
        table: np.ndarray[tuple[int, ...], np.dtype[np.int32]] = meta.block_table.numpy()
        counts = (table >= self._num_blocks).sum(1)
        if not counts.any():
            return None
        if is_layered:
            raise StepFailed("a step through some of the layers has no part elsewhere")
        starts = meta.query_start.tolist()
        ours, away = np.zeros_like(table), []
        for at, (chunk, count) in enumerate(zip(work, counts.tolist(), strict=True)):
            is_away = table[at] >= self._num_blocks
            ours[at, : table.shape[1] - count] = table[at, ~is_away]
            if count:
                rows = slice(starts[at], starts[at + 1])
                away.append(_Away(chunk.seq, rows, self._tables(table[at, is_away])))
        lent = torch.from_numpy(counts.astype(np.int32)) * self._size
        step.meta = StepMeta(
            meta.query_start,
            meta.context - lent,
            torch.from_numpy(ours),
            meta.slots,
            meta.max_query,
            meta.max_context,
        )
        return SplitAttention(self._local, away)

    def _tables(
        self, numbers: np.ndarray[tuple[int, ...], np.dtype[np.int32]]
    ) -> list[tuple[_Debt, bytes]]:
        """Who keeps these, and where in their loans."""
        found = []
        for debt in list(self._debts.values()):
            mine = numbers[(numbers >= debt.first) & (numbers < debt.first + debt.count)]
            if len(mine):
                found.append((debt, (mine - debt.first).astype(np.int32).tobytes()))
        assert sum([len(told) for _, told in found]) == 4 * len(numbers), "nobody keeps a block"
        return found
