"""Loans as one replica sees them: blocks it lends, and jobs of its own whose first blocks are with others.

As creditor it takes blocks for a loan while an eighth of its memory stays free, and keeps them until it is told that
the loan is over. While it is a debtor too, it lends no more than leaves its own request the half of the memory that it
works in: otherwise two could wait for what the other has lent.

As debtor it is told of a loan before the request comes, or while it runs. From then on the request's blocks get no
names, so nobody shares them. Whenever less than half of the memory is free and the job is in no plan, it is taken out
of its list and held, like a job that leaves; its whole blocks are copied to its creditors; then it goes on where it
stood, with their numbers in its table, and the copied blocks are free. A copy that fails ends the job.

What is away comes back never: the context of a request that was preempted is computed again, and lent anew.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice
from typing import cast

from msgspec import Struct

from penstock.core.lending import Loaned, LoanOver, Owed, Spilled
from penstock.core.ports import ContextSharing, LendingExecutor
from penstock.core.types import Job
from penstock.engine.lending_ledger import LendingLedger
from penstock.engine.parts import Parts

KEPT = 8  # a creditor keeps 1 / KEPT of its blocks
LEAST_BLOCKS = 4  # that are copied at a time, while there is room


class Lending(Struct, gc=False):
    """Asked from outside; see core.messages.Lend. `on_lent` hears where, or why not."""

    loan: int
    num_blocks: int
    on_lent: Callable[[str, str | None], None]


class Borrowing(Struct, gc=False):
    """See core.messages.Borrow."""

    loan: int
    request: str
    num_blocks: int
    address: str


class Returning(Struct, gc=False):
    """See core.messages.GiveBack."""

    loan: int


class Copied(Struct, gc=False):
    """A copy to creditors has ended."""

    request: str
    num_blocks: int
    error: str | None


LoanOrder = Lending | Borrowing | Returning | Copied


class _Debt(Struct, gc=False):
    request: str
    first: int
    count: int


class Loans:
    """One per replica. `put`: a turn is to apply this order."""

    def __init__(
        self,
        parts: Parts,
        put: Callable[[LoanOrder], None],
        take_blocks: Callable[[], None],
        ask_again: Callable[[], None],
    ) -> None:
        """`take_blocks`: what plans under way will need is taken before others get blocks."""
        self._parts, self._put, self._ask_again = parts, put, ask_again
        self._take_blocks = take_blocks
        self._ledger = cast(LendingLedger, parts.ledger)
        self._debts: dict[int, _Debt] = {}
        self._moving: dict[str, Job] = {}
        self.answers: list[Callable[[], None]] = []

    @property
    def has_debts(self) -> bool:
        return bool(self._debts)

    @property
    def is_lending(self) -> bool:
        return bool(self._ledger.lent)

    @property
    def counts(self) -> tuple[int, int]:
        """Blocks lent, and blocks away."""
        lent = sum([len(blocks) for blocks in self._ledger.lent.values()])
        return lent, sum(self._ledger.away.values())

    @property
    def _sharing(self) -> ContextSharing:
        return cast(LendingExecutor, self._parts.executor).sharing

    def note(self, order: Borrowing) -> None:
        """At once, as the request may come with the next message."""
        ledger, debts = self._ledger, self._debts
        first = max([each.first + each.count for each in debts.values()], default=ledger.total)
        debts[order.loan] = _Debt(order.request, first, order.num_blocks)
        credit = ledger.credit.get(order.request, 0)
        ledger.credit[order.request] = credit + order.num_blocks
        self._sharing.borrow(order.loan, first, order.num_blocks, order.address)

    def room_of(self, request: str) -> int:
        """Positions that a request may have in all."""
        caps, ledger = self._parts.executor.caps, self._ledger
        blocks = ledger.total + ledger.credit.get(request, 0)
        return min(caps.max_context, blocks * ledger.block_size)

    def apply(self, now: float, order: LoanOrder) -> None:
        if isinstance(order, Lending):
            self._lend(now, order)
        elif isinstance(order, Returning):
            self._end(now, order.loan)
        elif isinstance(order, Borrowing):
            told = Owed(
                at=now,
                who=self._parts.name,
                loan=order.loan,
                request=order.request,
                num_blocks=order.num_blocks,
            )
            self._parts.emit(told)
        else:
            self._arrive(now, order)

    def look(self, now: float) -> None:
        """Who has to make room, and can?"""
        ledger = self._ledger
        for request in {each.request: None for each in self._debts.values()}:
            jobs = self._parts.roster.jobs_of(request)
            if len(jobs) != 1:
                continue
            job = jobs[0]
            self._parts.briefing.borrow(job)
            if job.status != "running" or job.in_flight or job.carried or job.is_cancelled:
                continue
            if ledger.free < ledger.working:
                self._spill(job)

    # ------------------------------------------------------------------ as creditor

    def _lend(self, now: float, order: Lending) -> None:
        ledger, parts = self._ledger, self._parts
        self._take_blocks()
        count, error, address = order.num_blocks + 1, None, ""
        kept = ledger.total // KEPT + len(parts.roster.running)
        lent = self.counts[0]
        if ledger.free - count < kept:
            error = f"{ledger.free} blocks are free, and {kept} are kept"
        elif self._debts and ledger.total - lent - count < ledger.working + kept:
            error = f"{lent} blocks are lent, and a request of its own works in {ledger.working}"
        else:
            address = self._sharing.lend(order.loan, ledger.lend(order.loan, count))
        parts.emit(
            Loaned(
                at=now, who=parts.name, loan=order.loan, num_blocks=order.num_blocks, error=error
            )
        )
        self.answers.append(lambda: order.on_lent(address, error))

    def _end(self, now: float, loan: int) -> None:
        """At either end."""
        ledger, parts = self._ledger, self._parts
        parts.emit(LoanOver(at=now, who=parts.name, loan=loan))
        if loan in ledger.lent:
            self._sharing.take_back(loan)
            ledger.take_back(loan)
            self._ask_again()
        debt = self._debts.pop(loan, None)
        if debt is not None:
            left = ledger.credit[debt.request] - debt.count
            if left:
                ledger.credit[debt.request] = left
            else:
                del ledger.credit[debt.request]
            self._sharing.give_back(loan)

    # ------------------------------------------------------------------ as debtor

    def _numbers(self, request: str, first: int, count: int) -> list[int]:
        """So many, from the first on, of what its blocks are called when they are away."""
        debts = [each for each in self._debts.values() if each.request == request]
        known = chain.from_iterable([range(each.first, each.first + each.count) for each in debts])
        return list(islice(known, first, first + count))

    def _spill(self, job: Job) -> None:
        ledger, request = self._ledger, job.request.id
        away = ledger.away.get(job.seq, 0)
        room = ledger.credit.get(request, 0)
        count = min(job.computed // ledger.block_size, room) - away
        if count < LEAST_BLOCKS and (count < 1 or ledger.free > ledger.total // KEPT):
            return
        if not ledger.unname(job):
            return  # others read these blocks too
        table = ledger.tables[job.seq]
        numbers = self._numbers(request, away, count)
        pairs = zip(table[away : away + count], numbers, strict=True)
        self._parts.roster.hold(job)
        self._moving[request] = job
        self._sharing.spill(
            [(block, number, 1) for block, number in pairs],
            lambda error: self._put(Copied(request, count, error)),
        )

    def _arrive(self, now: float, told: Copied) -> None:
        parts, ledger = self._parts, self._ledger
        job = self._moving.pop(told.request)
        parts.emit(
            Spilled(
                at=now,
                who=parts.name,
                request=told.request,
                num_blocks=told.num_blocks,
                error=told.error,
            )
        )
        parts.roster.take_back(job, "running")
        if job.is_cancelled:
            parts.finish(now, job, "cancelled")
        elif told.error is not None:
            parts.finish(now, job, "error", error=told.error)
        else:
            first = ledger.away.get(job.seq, 0)
            ledger.spill(job, self._numbers(told.request, first, told.num_blocks))
            parts.briefing.retell(job)
        self._ask_again()
