"""Blocks that are called back from a creditor: they come home, or go to other creditors that were found for them.

    asked      some blocks of a loan are wanted back; other loans may come along, for as many of them or for fewer
    copied     when the job is in no plan it is held; those of its blocks that the loan keeps no longer are copied, into
               the loans that came along first, the others home, if an eighth of the memory stays free here
    over       the job goes on where it stood, with other numbers in its table; the loan is smaller, or over

What of a loan was not used yet goes first, and costs no copy. A copy that fails changes nothing: the loan stays, and
the job with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from msgspec import Struct

from penstock.core.lending import Recalled, Relocated
from penstock.core.sharing import ContextSharing, LendingExecutor
from penstock.core.types import Job
from penstock.engine.debts import Debt, Debts
from penstock.engine.lending_ledger import LendingLedger
from penstock.engine.parts import Parts

KEPT = 8  # 1 / KEPT of the memory stays free for what else runs
OVER = "the loan is over"


class Recalling(Struct, gc=False):
    """Asked from outside; see core.messages.Recall. `on_recalled` hears once that it is done, or why not."""

    loan: int
    num_blocks: int
    into: tuple[tuple[int, int, str], ...]  # loan, blocks, where
    on_recalled: Callable[[str | None], None]


class Relocating(Struct, gc=False):
    """The copy has ended."""

    loan: int
    error: str | None


class _Under(Struct, gc=False):
    """`places`: by position in the job's table, the number of the block from now on."""

    asked: Recalling
    job: Job
    fresh: list[Debt]
    places: dict[int, int]


class Recalls:
    """One per replica that borrows."""

    def __init__(
        self,
        parts: Parts,
        debts: Debts,
        put: Callable[[Relocating], None],
        take_blocks: Callable[[], None],
        ask_again: Callable[[], None],
    ) -> None:
        self._parts, self._debts, self._put = parts, debts, put
        self._take_blocks, self._ask_again = take_blocks, ask_again
        self._ledger = cast(LendingLedger, parts.ledger)
        self._asked: dict[int, Recalling] = {}
        self._under: dict[int, _Under] = {}
        self.answers: list[Callable[[], None]] = []

    @property
    def _sharing(self) -> ContextSharing:
        return cast(LendingExecutor, self._parts.executor).sharing

    def ask(self, now: float, asked: Recalling) -> None:
        into = tuple([(loan, count) for loan, count, _ in asked.into])
        self._parts.emit(
            Recalled(
                at=now,
                who=self._parts.name,
                loan=asked.loan,
                num_blocks=asked.num_blocks,
                into=into,
            )
        )
        self._asked[asked.loan] = asked
        self.look()

    def look(self) -> None:
        """Whose job is in no plan now?"""
        for loan, asked in list(self._asked.items()):
            debt = self._debts.get(loan)
            if debt is None:
                self._answer(asked, OVER)
                continue
            jobs = self._parts.roster.jobs_of(debt.request)
            job = jobs[0] if jobs else None
            if job is not None and _is_bound(job):
                continue
            self._begin(debt, asked, job)

    def arrive(self, now: float, told: Relocating) -> None:
        """The copy has ended, well or not."""
        under, parts = self._under.pop(told.loan), self._parts
        parts.emit(Relocated(at=now, who=parts.name, loan=told.loan, error=told.error))
        job, debt, error = under.job, self._debts.get(told.loan), told.error
        blocks = self._ledger.homing.pop(told.loan)
        if debt is None:
            error = OVER
        if debt is None or error is not None:
            self._ledger.put_back(blocks)
            for each in under.fresh:
                self._sharing.give_back(each.loan)
        else:
            self._ledger.relocate(job, under.places)
            self._cut(debt, under.asked, under.fresh)
            parts.briefing.retell(job)
        parts.roster.take_back(job, "running")
        if job.is_cancelled:
            parts.finish(now, job, "cancelled")
        self._answer(under.asked, error)
        self._ask_again()

    # ------------------------------------------------------------------ inside

    def _begin(self, debt: Debt, asked: Recalling, job: Job | None) -> None:
        count, room = min(asked.num_blocks, debt.count), sum([each for _, each, _ in asked.into])
        assert room <= count, "more is lent for it than it gives back"
        away = 0 if job is None else self._ledger.away.get(job.seq, 0)
        left = debt.count - count
        num = max(0, self._debts.used(debt, away) - left)  # that have to go somewhere
        home = max(0, num - room)
        self._take_blocks()
        if home and self._ledger.free - home < self._kept():
            self._answer(asked, f"{self._ledger.free} blocks are free at home, {home} would come")
            return
        fresh = [self._debts.made(loan, debt.request, each) for loan, each, _ in asked.into]
        for each, (_, _, address) in zip(fresh, asked.into, strict=True):
            self._sharing.borrow(each.loan, each.first, each.count, address)
        if job is None or not num:
            self._cut(debt, asked, fresh)
            self._answer(asked, None)
            return
        self._copy(debt, asked, job, fresh, [debt.first + left + at for at in range(num)])

    def _copy(
        self, debt: Debt, asked: Recalling, job: Job, fresh: list[Debt], numbers: Sequence[int]
    ) -> None:
        targets = [each.first + at for each in fresh for at in range(each.count)][: len(numbers)]
        blocks = self._ledger.take_home(asked.loan, len(numbers) - len(targets))
        goes = dict(zip(numbers, [*targets, *blocks], strict=True))
        table = self._ledger.tables[job.seq]
        places = {at: goes[number] for at, number in enumerate(table) if number in goes}
        self._parts.roster.hold(job)
        del self._asked[asked.loan]
        self._under[asked.loan] = _Under(asked, job, fresh, places)
        self._sharing.relocate(
            [(number, target, 1) for number, target in goes.items()],
            lambda error: self._put(Relocating(asked.loan, error)),
        )

    def _cut(self, debt: Debt, asked: Recalling, fresh: Sequence[Debt]) -> None:
        self._debts.cut(debt, min(asked.num_blocks, debt.count), fresh)
        if not debt.count:
            self._sharing.give_back(debt.loan)

    def _kept(self) -> int:
        return self._ledger.total // KEPT + len(self._parts.roster.running)

    def _answer(self, asked: Recalling, error: str | None) -> None:
        self._asked.pop(asked.loan, None)
        self.answers.append(lambda: asked.on_recalled(error))


def _is_bound(job: Job) -> bool:
    """Whether a plan, a movement or a copy holds it, or it is about to end."""
    is_held = job.status not in ("running", "waiting")
    return bool(is_held or job.in_flight or job.carried or job.is_cancelled)
