"""The block ledger of a replica that lends blocks and borrows some.

    lent     blocks that were taken for a request of another replica; nobody here holds them
    away     so many of a job's first blocks are another replica's. They stand in its table by numbers from `total` on,
             so that what it holds is counted as ever; they are nobody's here, and never free
    credit   blocks that a request may have away

A job whose blocks are away has no block with a name. Policies see, through a fork, that a job with credit needs no more
room at once than `working` blocks, as long as the rest fits what it was lent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from penstock.core.types import Job
from penstock.core.views import JobView
from penstock.engine.fork import Fork
from penstock.engine.ledger import BlockLedger
from penstock.engine.run_check import check_names, check_runs, check_tables, holders_of


class LendingLedger(BlockLedger):
    """See the module's text."""

    def __init__(
        self, num_blocks: int, block_size: int = 16, *, has_prefix_cache: bool = True
    ) -> None:
        super().__init__(num_blocks, block_size, has_prefix_cache=has_prefix_cache)
        self.lent: dict[int, list[int]] = {}  # by loan
        self.away: dict[int, int] = {}  # by job
        self.credit: dict[str, int] = {}  # by request

    @property
    def working(self) -> int:
        """A job that borrows keeps about so many blocks here."""
        return max(1, self.total // 2)

    def fork(self) -> Fork:
        return LendingFork(self)

    def lend(self, loan: int, count: int) -> list[int]:
        """The caller knows that so many are free."""
        if count > len(self._unused):
            self._empty(count - len(self._unused))
        blocks = self.lent[loan] = [self._unused.pop() for _ in range(count)]
        return blocks

    def take_back(self, loan: int) -> None:
        self._unused += self.lent.pop(loan, [])

    def unname(self, job: Job) -> bool:
        """Nobody finds its blocks any more; False: somebody holds some of them too."""
        runs = self.runs(job.seq)
        if any([run.refs > 1 for run in runs]):
            return False
        for run in runs:
            self._end(run)
        if runs:
            self._is_whole = False
            self.registered[job.seq] = 0
            del self._last[job.seq]
        return True

    def spill(self, job: Job, numbers: Sequence[int]) -> None:
        """Its next blocks are away, under these numbers."""
        table, first = self.tables[job.seq], self.away.get(job.seq, 0)
        assert not self.registered.get(job.seq), "a block that is away has a name"
        place = slice(first, first + len(numbers))
        self._unused += table[place]
        table[place] = numbers
        self.away[job.seq] = first + len(numbers)

    def release(self, job: Job, computed: int | None = None) -> int:
        away = self.away.pop(job.seq, 0)
        if away:
            del self.tables[job.seq][:away]
        return super().release(job, computed)

    def check(self) -> None:
        refs = holders_of(self.tables, self.registered, self._last, self.runs)
        free = [*self._unused, *self.idle_blocks()]
        assert len(free) == self.free, "free blocks are miscounted"
        ours = {seq: table[self.away.get(seq, 0) :] for seq, table in self.tables.items()}
        for blocks in self.lent.values():
            free += blocks
        check_tables(ours, self.registered, free, self.total)
        check_runs(refs, self._idle, self._starts)
        check_names({*refs, *self._idle}, self.index, self._twins)


class LendingFork(Fork):
    """Borrowed room counts."""

    __slots__ = ("_lending",)

    def __init__(self, ledger: LendingLedger) -> None:
        super().__init__(ledger)
        self._lending = ledger
        self.total += sum(ledger.credit.values())

    def need(self, job: JobView, upto: int) -> int:
        need, ledger = super().need(job, upto), self._lending
        credit = ledger.credit.get(cast(Job, job).request.id)
        if credit is None or self.held(job):
            return need
        return max(min(need, ledger.working), need - credit)

    def freeable(self, job: JobView) -> int:
        away = 0 if job.seq in self._gone else self._lending.away.get(job.seq, 0)
        return super().freeable(job) - away

    def release(self, job: JobView) -> int:
        away = 0 if job.seq in self._gone else self._lending.away.get(job.seq, 0)
        freed = super().release(job) - away
        self.free -= away
        return freed
