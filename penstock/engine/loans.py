"""Loans as one replica sees them: blocks it lends, and jobs of its own whose first blocks are with others.

As creditor it takes blocks for a loan while an eighth of its memory stays free, and what the next in its queue needs,
and keeps them until it is told that the loan is over. While it is a debtor too, it lends no more than leaves its own
request the half of the memory that it works in: otherwise two could wait for what the other has lent.

As debtor it is told of a loan before the request comes, or while it runs. From then on the request's blocks get no
names, so nobody shares them. Whenever less than half of the memory is free and the job is in no plan, it is taken out
of its list and held, like a job that leaves; its whole blocks are copied to its creditors; then it goes on where it
stood, with their numbers in its table, and the copied blocks are free. A copy that fails ends the job.

What is away comes back when its creditor wants it (engine.recalls); the context of a request that was preempted is
computed again, and lent anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from msgspec import UNSET, Struct

from penstock.core.lending import Loaned, LoanOver, Owed, Spilled
from penstock.core.sharing import ContextSharing, LendingExecutor
from penstock.core.types import Job
from penstock.engine.debts import Debts
from penstock.engine.lending_ledger import LendingLedger
from penstock.engine.parts import Parts
from penstock.engine.recalls import Recalling, Recalls, Relocating

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
    num_blocks: int | None = None


class Copied(Struct, gc=False):
    """A copy to creditors has ended."""

    request: str
    num_blocks: int
    error: str | None


LoanOrder = Lending | Borrowing | Returning | Copied | Recalling | Relocating


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
        self._debts = Debts(self._ledger)
        self.recalls = Recalls(parts, self._debts, put, take_blocks, ask_again)
        self._moving: dict[str, Job] = {}
        self.answers: list[Callable[[], None]] = []
        parts.roster.room_of = self.room_of

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
        debt = self._debts.made(order.loan, order.request, order.num_blocks)
        self._debts.owe(debt)
        self._sharing.borrow(order.loan, debt.first, order.num_blocks, order.address)

    def room_of(self, request: str) -> int:
        """Positions that a request may have in all."""
        caps, ledger = self._parts.executor.caps, self._ledger
        blocks = ledger.total + ledger.credit.get(request, 0)
        return min(caps.max_context, blocks * ledger.block_size)

    def apply(self, now: float, order: LoanOrder) -> None:
        if isinstance(order, Lending):
            self._lend(now, order)
        elif isinstance(order, Returning):
            self._end(now, order)
        elif isinstance(order, Recalling):
            self.recalls.ask(now, order)
        elif isinstance(order, Relocating):
            self.recalls.arrive(now, order)
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
        self.recalls.look()
        for request in self._debts.requests():
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
        kept = ledger.total // KEPT + len(parts.roster.running) + self._next_needs()
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

    def _next_needs(self) -> int:
        """Blocks of whoever is next in the queue, which are not lent."""
        head = next(iter(self._parts.roster.waiting), None)
        return 0 if head is None else self._ledger.fork().need(head, head.known)

    def _end(self, now: float, order: Returning) -> None:
        """At either end."""
        ledger, parts, loan, num_blocks = self._ledger, self._parts, order.loan, order.num_blocks
        told = UNSET if num_blocks is None else num_blocks
        parts.emit(LoanOver(at=now, who=parts.name, loan=loan, num_blocks=told))
        if loan in ledger.lent:
            self._sharing.take_back(loan, num_blocks)
            ledger.take_back(loan, num_blocks)
            self._ask_again()
        if num_blocks is None and self._debts.end(loan):
            self._sharing.give_back(loan)

    # ------------------------------------------------------------------ as debtor

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
        numbers = self._debts.numbers(request, away, count)
        blocks = [table[at] for at in ledger.at_home(job, count)]
        pairs = zip(blocks, numbers, strict=True)
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
            ledger.spill(job, self._debts.numbers(told.request, first, told.num_blocks))
            parts.briefing.retell(job)
        self._ask_again()
