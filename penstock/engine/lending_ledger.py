"""The block ledger of a replica that lends blocks and borrows some.

    lent     blocks that were taken for a request of another replica; nobody here holds them
    away     so many of a job's blocks are another replica's. They stand in its table by numbers from `total` on, so
             that what it holds is counted as ever; they are nobody's here, and never free
    credit   blocks that a request may have away
    homing   blocks that some of what is away comes back to; nobody holds them yet

A job whose blocks are away has no block with a name. Policies see, through a fork, that a job with credit needs no more
room at once than `working` blocks, as long as the rest fits what it was lent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
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
        self.homing: dict[int, list[int]] = {}  # by loan
        self._at_home: dict[int, int] = {}  # by job: before this place all its blocks are away

    @property
    def working(self) -> int:
        """A job that borrows keeps about so many blocks here."""
        return max(1, self.total // 2)

    def fork(self) -> Fork:
        return LendingFork(self)

    def lend(self, loan: int, count: int) -> list[int]:
        """The caller knows that so many are free."""
        blocks = self.lent[loan] = self._taken(count)
        return blocks

    def take_back(self, loan: int, num_blocks: int | None = None) -> None:
        """All of them, or the last ones before the very last (core.sharing)."""
        if num_blocks is None:
            self._unused += self.lent.pop(loan, [])
        else:
            place = slice(-1 - num_blocks, -1)
            self._unused += self.lent[loan][place]
            del self.lent[loan][place]

    def take_home(self, loan: int, count: int) -> list[int]:
        """The caller knows that so many are free."""
        blocks = self.homing[loan] = self._taken(count)
        return blocks

    def put_back(self, blocks: Sequence[int]) -> None:
        """They were taken for nothing."""
        self._unused += blocks

    def _taken(self, count: int) -> list[int]:
        if count > len(self._unused):
            self._empty(count - len(self._unused))
        return [self._unused.pop() for _ in range(count)]

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

    def at_home(self, job: Job, count: int) -> list[int]:
        """Where in its table the first so many blocks stand that are here."""
        table, total = self.tables[job.seq], self.total
        ahead = range(self._at_home.get(job.seq, 0), len(table))
        return list(islice((at for at in ahead if table[at] < total), count))

    def spill(self, job: Job, numbers: Sequence[int]) -> None:
        """The first of its blocks that are here are away now, under these numbers."""
        assert not self.registered.get(job.seq), "a block that is away has a name"
        table, places = self.tables[job.seq], self.at_home(job, len(numbers))
        for at, number in zip(places, numbers, strict=True):
            self._unused.append(table[at])
            table[at] = number
        self.away[job.seq] = self.away.get(job.seq, 0) + len(numbers)
        if places:
            self._at_home[job.seq] = places[-1] + 1

    def relocate(self, job: Job, places: Mapping[int, int]) -> None:
        """Some that were away are elsewhere or here: by place in its table, their numbers."""
        table, home = self.tables[job.seq], 0
        for at, number in places.items():
            assert table[at] >= self.total, "it was here all the while"
            table[at] = number
            home += number < self.total
        self.away[job.seq] -= home
        if home:
            self._at_home[job.seq] = 0
            if not self.away[job.seq]:
                del self.away[job.seq]

    def release(self, job: Job, computed: int | None = None) -> int:
        self._at_home.pop(job.seq, None)
        if self.away.pop(job.seq, 0):
            table = self.tables[job.seq]
            table[:] = [block for block in table if block < self.total]
        return super().release(job, computed)

    def check(self) -> None:
        refs = holders_of(self.tables, self.registered, self._last, self.runs)
        free = [*self._unused, *self.idle_blocks()]
        assert len(free) == self.free, "free blocks are miscounted"
        ours = {
            seq: [block for block in table if block < self.total]
            for seq, table in self.tables.items()
        }
        for seq, table in self.tables.items():
            assert len(table) - len(ours[seq]) == self.away.get(seq, 0), "away is miscounted"
        for blocks in (*self.lent.values(), *self.homing.values()):
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
