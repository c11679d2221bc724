"""Requests longer than one replica's memory: which others keep blocks for them, and until when.

A request that comes and may need more blocks than its replica keeps for one (half of its memory, the rest being for
others) is placed as ever; before it is sent, blocks are reserved with the other replicas, those with the most free
blocks first. A replica that has less room than its last report said lends nothing, and the next one is asked. With
enough reserved the home is told of the loans, then gets the request. From then on home and creditors deal with each
other; a loan is over when the request is, however it ends, or when its blocks were called back (cluster.recalls).

A request is sent when its home has room for the half that it works in, or lends nothing itself, and a replica lends
nothing that the next in its queue needs. So a request that has begun has all that it will need, and whoever waits does
so for requests that have begun, or for the one that nobody passes: no circle of replicas waits for each other.

Several may wait at a time. Every AGAIN_S seconds those are asked for, in the order in which they came, for whom there
seems to be enough: each gets all or gives back what it got, so that no two wait for what the other holds. Whoever came
first and has waited for PATIENCE_S keeps what it gets, and nobody passes it any more; if it has not got all within
HOLD_S it gives that back and begins again, since who holds it up may wait for it. Whoever would not fit among replicas
that have nothing else to do is told so at once; one whose home is lost or drains meanwhile is placed anew.

`lend` does the same for a request that runs, as often as somebody wants: the debtor's batch grows by what it can move
out of its memory; `recall` has some of it come home. What is refused then is not asked for again here: whoever decides
it may want it once more.

Conflict with movements: a request with blocks elsewhere stays where it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, cast

from msgspec import UNSET

from penstock.cluster.borrowers import (
    LEAST,
    Borrower,
    Kept,
    OnReady,
    can_lend,
    most_of,
    must_lend,
    spare_of,
)
from penstock.cluster.moving_end import MovingEnd
from penstock.cluster.recalls import Recalls
from penstock.cluster.router import Router
from penstock.core.clock import now
from penstock.core.errors import (
    ContextTooLong,
    Draining,
    Overloaded,
    PenstockError,
    ReplicaLost,
)
from penstock.core.messages import Lent
from penstock.core.ports import ReplicaPort
from penstock.core.types import Report, Request

if TYPE_CHECKING:
    from penstock.cluster.ticket import Ticket

AGAIN_S = 0.1  # as often as replicas report
PATIENCE_S, HOLD_S = 1.0, 5.0


class Lendings:
    """One per fleet. Replicas that cannot lend say so: their reports tell of no blocks lent, not even of none."""

    def __init__(
        self, ports: Mapping[str, ReplicaPort], router: Router, tickets: Mapping[str, Ticket]
    ) -> None:
        self._ports, self._router, self._tickets = ports, router, tickets
        self._count = 0
        self._borrowers: dict[str, Borrower] = {}
        self._coming: dict[str, Borrower] = {}  # who is not sent yet, by request, in order
        self._recalls = Recalls(ports, router, self._borrowers, self._room, self._number)
        self._timer: asyncio.TimerHandle | None = None

    def lent(self) -> Mapping[str, tuple[tuple[str, int], ...]]:
        """By request that runs, who keeps how many blocks for it."""
        return {
            request: tuple([(kept.creditor, kept.num) for kept in each.loans.values()])
            for request, each in self._borrowers.items()
            if each.on_ready is None and each.loans
        }

    def missing(self, request: Request, home: str) -> int:
        """Blocks of a request that its home has no room for."""
        report = self._router.reports[home]
        size, total = report.block_size, report.total_blocks
        if report.lent_blocks is UNSET:
            return 0
        if request.n > 1 or request.prompt.num_tokens < total * size // 2:
            return 0  # it fits, or at least begins
        return must_lend(request, report)

    def defers(self, ticket: Ticket, home: str, on_ready: OnReady) -> bool:
        """Whether others are asked for blocks first; then `on_ready` hears when the home may get it, or why not."""
        missing = self.missing(ticket.request, home)
        if not missing:
            return False
        ticket.replica, ticket.borrows = home, True
        borrower = Borrower(ticket, home, missing, on_ready, now())
        self._borrowers[ticket.request.id] = self._coming[ticket.request.id] = borrower
        self._serve()
        return True

    def lend(self, request_id: str, creditor: str, num_blocks: int) -> None:
        """One creditor keeps up to so many more blocks of a request that runs, if it has the room."""
        ticket = self._tickets.get(request_id)
        if ticket is None or ticket.movement is not None:
            return
        report = self._router.reports.get(creditor)
        if report is None or report.lent_blocks is UNSET:
            return
        if ticket.request.n > 1 or creditor == ticket.replica:
            return
        borrower = self._borrowers.get(request_id)
        if borrower is None:
            ticket.borrows = True
            borrower = self._borrowers[request_id] = Borrower(ticket, ticket.replica)
        if not (borrower.is_asking or borrower.is_moving) and borrower.on_ready is None:
            borrower.missing, borrower.creditors = num_blocks, [creditor]
            self._ask(borrower)

    def recall(self, request_id: str, creditor: str, num_blocks: int) -> None:
        """Up to so many blocks of a request that runs come home from one creditor, as far as there is room."""
        borrower = self._borrowers.get(request_id)
        if borrower is not None and borrower.on_ready is None and not borrower.is_asking:
            self._recalls.bring_home(borrower, creditor, num_blocks)

    def hear(self, report: Report) -> None:
        """A creditor may want its blocks back; it, or the home, may be gone before the request was sent."""
        if report.is_draining or not report.is_alive:
            self._leave(report)
        if report.is_alive:
            self._recalls.hear(report)
            return
        for borrower in self._coming.values():
            for loan, kept in list(borrower.loans.items()):
                if kept.creditor == report.replica:
                    del borrower.loans[loan]
                    borrower.missing += kept.num

    def end(self, ticket: Ticket) -> None:
        """The request is over, or will begin anew elsewhere."""
        if ticket.borrows:
            ticket.borrows = False
            self._give_back(ticket.request.id)

    def _give_back(self, request_id: str) -> None:
        borrower = self._borrowers.pop(request_id, None)
        self._coming.pop(request_id, None)
        if borrower is None:
            return
        for loan, kept in (*borrower.loans.items(), *borrower.coming.items()):
            for name in (kept.creditor, borrower.home):
                if name in self._ports:
                    self._end_of(name).give_back(loan)

    # ---------------------------------------------------------------- inside

    def _end_of(self, name: str) -> MovingEnd:
        return cast(MovingEnd, self._ports[name])

    def _number(self) -> int:
        self._count += 1
        return self._count

    def _leave(self, home: Report) -> None:
        """Whoever waits to be sent there is placed anew, before the fleet forgets that replica."""
        for borrower in list(self._coming.values()):
            if borrower.home == home.replica and borrower.on_ready is not None:
                drains = Draining(f"{home.replica} is shutting down")
                self._settle(borrower, drains if home.is_alive else _lost(home.replica))

    def _serve(self) -> None:
        """Another round: who of those that are coming can be asked for?"""
        taken = 0  # by those before
        for place, borrower in enumerate(list(self._coming.values())):
            is_first = place == 0 and now() - borrower.came_at >= PATIENCE_S
            others = None if borrower.is_asking else self._others(borrower)
            if others is not None:
                self._serve_one(borrower, others, is_first=is_first, taken=taken)
            if is_first and borrower.on_ready is not None:
                break
            taken += borrower.missing if borrower.is_asking else 0
        if self._coming and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(AGAIN_S, self._serve_again)

    def _serve_one(
        self, borrower: Borrower, others: list[Report], *, is_first: bool, taken: int
    ) -> None:
        is_ready = self._is_ready(borrower.home)
        if is_first and now() - borrower.came_at >= PATIENCE_S + HOLD_S:
            borrower.came_at = now()  # others may need what it holds before it can have the rest
            self._fall_short(borrower)
        elif not borrower.missing:
            if is_ready:
                self._settle(borrower, None)
        elif is_first or (is_ready and sum(map(self._room, others)) - taken >= borrower.missing):
            borrower.creditors = [report.replica for report in others]
            self._ask(borrower)

    def _serve_again(self) -> None:
        self._timer = None
        self._serve()

    def _others(self, borrower: Borrower) -> list[Report] | None:
        """Who may lend, the one with the most first; None: it needs nobody any more, and was told why."""
        reports, home = self._router.reports, borrower.home
        if borrower.ticket.is_cancelled:
            self._settle(borrower, None)
            return None
        if home not in self._ports or not reports[home].is_alive:
            self._settle(borrower, _lost(home))
            return None
        others = [each for each in reports.values() if can_lend(each, home)]
        needs = borrower.num_kept + borrower.missing
        if sum(map(most_of, others)) < needs:
            everybody = [each for each in reports.values() if each.replica != home]
            is_too_long = sum(map(most_of, everybody)) < needs
            error = self._too_long(borrower) if is_too_long else _too_few(len(others))
            self._settle(borrower, error)
            return None
        return sorted(others, key=lambda report: (-report.free_blocks, report.replica))

    def _ask(self, borrower: Borrower) -> None:
        while borrower.creditors:
            name = borrower.creditors.pop(0)
            report = self._router.reports.get(name)
            if report is None or name not in self._ports or not can_lend(report, borrower.home):
                continue  # it was up when it was listed
            count = min(borrower.missing, self._room(report))
            if count < min(borrower.missing, max(1, report.total_blocks // LEAST)):
                continue
            borrower.is_asking = True
            told = partial(self._hear, borrower, name, count)
            self._end_of(name).lend(self._number(), count, told)
            return
        if borrower.on_ready is not None:
            self._fall_short(borrower)
        elif not borrower.loans:
            self._borrowers.pop(borrower.ticket.request.id, None)
            borrower.ticket.borrows = False

    def _fall_short(self, borrower: Borrower) -> None:
        """Not all could be had. Who has waited for long, and came first, keeps it."""
        is_first = next(iter(self._coming.values())) is borrower
        if is_first and now() - borrower.came_at >= PATIENCE_S:
            return
        for loan, kept in borrower.loans.items():
            if kept.creditor in self._ports:
                self._end_of(kept.creditor).give_back(loan)
        borrower.missing += borrower.num_kept
        borrower.loans.clear()

    def _is_ready(self, home: str) -> bool:
        """Whether a request with loans would begin there, or wait for nobody's but its own replica's requests."""
        report = self._router.reports[home]
        deferred = sum([each.home == home for each in self._coming.values()])
        told = report.num_running + report.num_waiting
        if report.lent_blocks and self._router.outstanding[home] - deferred > told:
            return False  # some are on their way, and not in its report
        room = report.free_blocks - report.waiting_blocks - report.num_running - 1
        return not report.lent_blocks or room >= report.total_blocks // 2

    def _room(self, report: Report) -> int:
        """Blocks that it can lend by its last report; a home keeps the half that its own request works in."""
        room, total = spare_of(report), report.total_blocks
        first = next(iter(self._coming.values()), None)
        if any(
            each.home == report.replica
            for each in self._borrowers.values()
            if each.loans or each is first
        ):
            lent = report.lent_blocks if isinstance(report.lent_blocks, int) else 0
            room = min(room, total - total // 2 - lent - (report.free_blocks - room))
        return max(0, room)

    def _hear(
        self, borrower: Borrower, creditor: str, count: int, told: Lent | PenstockError
    ) -> None:
        borrower.is_asking = False
        is_known = self._borrowers.get(borrower.ticket.request.id) is borrower
        if not is_known:  # it was given up meanwhile
            if isinstance(told, Lent) and creditor in self._ports:
                self._end_of(creditor).give_back(told.loan)
            return
        if isinstance(told, Lent) and told.error is None:
            borrower.loans[told.loan] = Kept(creditor, count, told.address)
            borrower.missing -= count
            if borrower.on_ready is None and borrower.home in self._ports:
                self._tell_home(borrower, told.loan)
        if borrower.missing > 0:
            self._ask(borrower)
        elif borrower.on_ready is not None and self._others(borrower) is not None:
            if self._is_ready(borrower.home):
                self._settle(borrower, None)
            else:
                self._fall_short(borrower)

    def _tell_home(self, borrower: Borrower, loan: int) -> None:
        _, count, address = borrower.loans[loan]
        self._end_of(borrower.home).borrow(loan, borrower.ticket.request.id, count, address)

    def _settle(self, borrower: Borrower, error: PenstockError | None) -> None:
        """It is sent or refused now."""
        on_ready, borrower.on_ready = borrower.on_ready, None
        assert on_ready is not None, "it is told twice"
        del self._coming[borrower.ticket.request.id]
        if error is not None or borrower.ticket.is_cancelled:
            self._give_back(borrower.ticket.request.id)
        else:
            for loan in borrower.loans:
                self._tell_home(borrower, loan)
        on_ready(error)

    def _too_long(self, borrower: Borrower) -> ContextTooLong:
        total = sum([report.free_blocks for report in self._router.reports.values()])
        return ContextTooLong(
            f"the request needs more memory than the replicas can lend it: {borrower.missing} blocks "
            f"are missing, and {total} are free in all",
            hint="shorten the prompt or ask for fewer tokens",
            param="prompt",
        )


def _lost(home: str) -> ReplicaLost:
    return ReplicaLost(f"{home} was lost before it had the request")


def _too_few(num: int) -> Overloaded:
    return Overloaded(
        f"the request needs memory of more replicas than the {num} others that can lend now",
        hint="try again in a moment",
        retry_after_s=1.0,
    )
