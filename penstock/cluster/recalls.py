"""Creditors that get their blocks back: who asks for how many, of which loan, and where they go.

A replica whose next request has no room while it keeps blocks for others calls some back: as many as are missing, of
its largest loan whose request has not been disturbed for CALM_S. They go home if there is room and nobody waits there,
else to other replicas with room, where nobody waits either; loans are made for them first, as for any request. If they
have room for a part, a part is called back, and with no room anywhere it waits as it did. Of a request
that is longer than a memory, what others must keep goes to others only: with less it might wait at home for what its
home has lent.

Then its home is told (core.messages.Recall), which copies at its time; when it says that it has, the creditor gets its
blocks, and the fleet's book of loans is changed. If anything fails everything stays as it was, and what was lent for it
is given back. One at a time of a creditor, and of a request.

`bring_home` is for policies (v1 of Infinite-LLM cancels mutual debts so).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from penstock.cluster.borrowers import LEAST, Borrower, Kept, can_lend, must_lend, spare_of
from penstock.cluster.moving_end import MovingEnd
from penstock.cluster.router import Router
from penstock.core.clock import now
from penstock.core.errors import PenstockError
from penstock.core.messages import Lent, Recalled
from penstock.core.ports import ReplicaPort
from penstock.core.types import Report

CALM_S = 1.0


@dataclass(slots=True)
class _Call:
    """One under way. `targets`: who is to be asked yet, for how many blocks; `home`: how many go there."""

    borrower: Borrower
    loan: int
    creditor: str
    home: int
    targets: list[tuple[str, int]] = field(default_factory=list)


class Recalls:
    """One per fleet. `room`: blocks that a replica can lend, by its report; `number`: of the next loan."""

    def __init__(
        self,
        ports: Mapping[str, ReplicaPort],
        router: Router,
        borrowers: Mapping[str, Borrower],
        room: Callable[[Report], int],
        number: Callable[[], int],
    ) -> None:
        self._ports, self._router, self._borrowers = ports, router, borrowers
        self._room, self._number = room, number
        self._busy: set[str] = set()  # creditors

    def hear(self, report: Report) -> None:
        """Does it lack what it lent?"""
        wanted = report.head_blocks - report.free_blocks
        if not isinstance(report.lent_blocks, int) or not report.lent_blocks or wanted < 1:
            return
        if not report.num_waiting or report.replica in self._busy:
            return
        wanted = max(wanted, report.total_blocks // LEAST)
        for loan, borrower in self._loans_of(report.replica):
            if self._call_back(borrower, loan, min(wanted, borrower.loans[loan].num)):
                return

    def bring_home(self, borrower: Borrower, creditor: str, num_blocks: int) -> None:
        room = min(num_blocks, self._home_room(borrower))
        of_creditor = [pair for pair in self._loans_of(creditor) if pair[1] is borrower]
        if of_creditor and room > 0 and creditor not in self._busy:
            loan = of_creditor[0][0]
            count = min(room, borrower.loans[loan].num)
            self._begin(_Call(borrower, loan, creditor, count))

    # ---------------------------------------------------------------- inside

    def _loans_of(self, creditor: str) -> list[tuple[int, Borrower]]:
        """Those that may be called back, the largest first."""
        at = now()
        found = [
            (loan, each)
            for each in self._borrowers.values()
            if each.on_ready is None and not (each.is_asking or each.is_moving)
            if each.moved_at is None or at - each.moved_at >= CALM_S
            for loan, kept in each.loans.items()
            if kept.creditor == creditor
        ]
        return sorted(found, key=lambda pair: (-pair[1].loans[pair[0]].num, pair[0]))

    def _call_back(self, borrower: Borrower, loan: int, count: int) -> bool:
        """Whether there is room for any of it elsewhere."""
        creditor = borrower.loans[loan].creditor
        call = _Call(borrower, loan, creditor, min(count, self._home_room(borrower)))
        left = count - call.home
        others = [
            each
            for each in self._router.reports.values()
            if can_lend(each, borrower.home) and each.replica != creditor and not each.num_waiting
        ]
        for each in sorted(others, key=lambda each: (-each.free_blocks, each.replica)):
            room = min(left, self._room(each))
            if room and room >= min(left, max(1, each.total_blocks // LEAST)):
                call.targets.append((each.replica, room))
                left -= room
        if left == count or borrower.home not in self._ports:
            return False
        self._begin(call)
        return True

    def _home_room(self, borrower: Borrower) -> int:
        """Blocks that may come home: there is room, nobody waits for it, and no others must keep them."""
        report = self._router.reports.get(borrower.home)
        if report is None or not report.is_alive or report.num_waiting:
            return 0
        away = must_lend(borrower.ticket.request, report)
        return max(0, min(spare_of(report), borrower.num_kept - away))

    def _begin(self, call: _Call) -> None:
        call.borrower.is_moving = True
        self._busy.add(call.creditor)
        self._ask(call)

    def _ask(self, call: _Call) -> None:
        """The next of those that are to keep some; when all have said, the home."""
        while call.targets:
            name, count = call.targets.pop(0)
            report = self._router.reports.get(name)
            if report is not None and report.is_alive and name in self._ports:
                told = partial(self._hear_lent, call, name, count)
                self._end_of(name).lend(self._number(), count, told)
                return
        borrower = call.borrower
        into = tuple([(loan, kept.num, kept.address) for loan, kept in borrower.coming.items()])
        count = call.home + sum([each for _, each, _ in into])
        if not count or borrower.home not in self._ports:
            self._give_back(borrower, borrower.coming)
            self._over(call)
            return
        told_home = partial(self._hear_home, call, count)
        self._end_of(borrower.home).recall(call.loan, count, into, told_home)

    def _hear_lent(self, call: _Call, name: str, count: int, told: Lent | PenstockError) -> None:
        is_lent = isinstance(told, Lent) and told.error is None
        if not self._is_open(call):
            if isinstance(told, Lent) and is_lent and name in self._ports:
                self._end_of(name).give_back(told.loan)
            self._over(call)
            return
        if isinstance(told, Lent) and is_lent:
            call.borrower.coming[told.loan] = Kept(name, count, told.address)
        self._ask(call)

    def _hear_home(self, call: _Call, count: int, told: Recalled | PenstockError) -> None:
        borrower, loan = call.borrower, call.loan
        if not self._is_open(call):  # all its loans were given back
            self._over(call)
            return
        if isinstance(told, PenstockError) or told.error is not None:
            self._give_back(borrower, borrower.coming)
        else:
            kept, borrower.moved_at = borrower.loans[loan], now()
            if count < kept.num:
                borrower.loans[loan] = kept._replace(num=kept.num - count)
                if kept.creditor in self._ports:
                    self._end_of(kept.creditor).give_back(loan, count)
            else:
                del borrower.loans[loan]
                self._give_back(borrower, {loan: kept})
            borrower.loans |= borrower.coming
        self._over(call)

    def _is_open(self, call: _Call) -> bool:
        borrower = call.borrower
        is_known = self._borrowers.get(borrower.ticket.request.id) is borrower
        return is_known and call.loan in borrower.loans

    def _give_back(self, borrower: Borrower, loans: Mapping[int, Kept]) -> None:
        """At both ends."""
        for loan, kept in loans.items():
            for name in (kept.creditor, borrower.home):
                if name in self._ports:
                    self._end_of(name).give_back(loan)

    def _over(self, call: _Call) -> None:
        call.borrower.coming = {}
        call.borrower.is_moving = False
        self._busy.discard(call.creditor)

    def _end_of(self, name: str) -> MovingEnd:
        return cast(MovingEnd, self._ports[name])
