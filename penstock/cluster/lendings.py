"""Requests longer than one replica's memory: which others keep blocks for them, and until when.

A request that comes and may need more blocks than its replica keeps for one (half of its memory, the rest being for
others) is placed as ever; before it is sent, blocks are reserved with the other replicas, those with the most free
blocks first. A replica that has less room than its last report said lends nothing, and the next one is asked. With
enough reserved the home is told of the loans, then gets the request. Where all have too little for now, what was
reserved is kept and the rest is asked for again every AGAIN_S seconds; those who come later wait behind it, so that no
two wait for what the other holds. Whoever would not fit among replicas that have nothing else to do is told so at once.
From then on home and creditors deal with each other; a loan is over when the request is, however it ends.

`lend` does the same for a request that runs, as often as somebody wants: the debtor's batch grows by what it can move
out of its memory. What is refused then is not asked for again here: whoever decides it may want it once more.

Conflict with movements: a request with blocks elsewhere stays where it is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, cast

from penstock.cluster.moving_end import MovingEnd
from penstock.cluster.router import Router
from penstock.core.errors import ContextTooLong, PenstockError
from penstock.core.messages import Lent
from penstock.core.ports import ReplicaPort
from penstock.core.types import Report, Request

if TYPE_CHECKING:
    from penstock.cluster.ticket import Ticket

SPARE = 8  # a creditor keeps 1 / SPARE of its memory (engine.loans)
LEAST = (
    32  # a loan is 1 / LEAST of its memory, or all that is missing: each takes a line of its own
)
AGAIN_S = 0.1  # as often as replicas report
OnReady = Callable[[PenstockError | None], None]


@dataclass(slots=True)
class _Borrower:
    """What one request has, and still looks for: `on_ready` is set while it waits to be sent."""

    ticket: Ticket
    home: str
    missing: int = 0
    on_ready: OnReady | None = None
    creditors: list[str] = field(default_factory=list)  # to be asked yet
    loans: dict[int, tuple[str, int, str]] = field(default_factory=dict)  # creditor, blocks, where
    is_asking: bool = False


class Lendings:
    """One per fleet. Where `is_on` is not set, nobody lends."""

    def __init__(self, ports: Mapping[str, ReplicaPort], router: Router, *, is_on: bool) -> None:
        self._is_on = is_on
        self._ports, self._router = ports, router
        self._count = 0
        self._borrowers: dict[str, _Borrower] = {}
        self._coming: deque[_Borrower] = deque()  # who is not sent yet; the first one is served

    def lent(self) -> Mapping[str, tuple[tuple[str, int], ...]]:
        """By request that runs, who keeps how many blocks for it."""
        return {
            request: tuple([(creditor, count) for creditor, count, _ in each.loans.values()])
            for request, each in self._borrowers.items()
            if each.on_ready is None
        }

    def missing(self, request: Request, home: str) -> int:
        """Blocks of a request that its home has no room for."""
        report = self._router.reports[home]
        longest = request.prompt.num_tokens + request.sampling.max_tokens
        size, total = report.block_size, report.total_blocks
        if request.n > 1 or request.prompt.num_tokens < total * size // 2:
            return 0  # it fits, or at least begins
        blocks = -(-longest // size)
        return 0 if blocks <= total - total // SPARE else blocks - total // 2

    def defers(self, ticket: Ticket, home: str, on_ready: OnReady) -> bool:
        """Whether others are asked for blocks first; then `on_ready` hears when the home may get it, or why not."""
        missing = self.missing(ticket.request, home) if self._is_on else 0
        if not missing:
            return False
        ticket.replica, ticket.borrows = home, True
        borrower = _Borrower(ticket, home, missing, on_ready)
        self._borrowers[ticket.request.id] = borrower
        self._coming.append(borrower)
        if self._coming[0] is borrower:
            self._ask_all(borrower)
        return True

    def lend(self, ticket: Ticket, creditor: str, num_blocks: int) -> None:
        """One creditor keeps up to so many more blocks of a request that runs, if it has the room."""
        request = ticket.request
        if not self._is_on or request.n > 1 or creditor == ticket.replica:
            return
        borrower = self._borrowers.get(request.id)
        if borrower is None:
            ticket.borrows = True
            borrower = self._borrowers[request.id] = _Borrower(ticket, ticket.replica)
        if not borrower.is_asking and borrower.on_ready is None:
            borrower.missing, borrower.creditors = num_blocks, [creditor]
            self._ask(borrower)

    def end(self, ticket: Ticket) -> None:
        """The request is over, or will begin anew elsewhere."""
        if ticket.borrows:
            ticket.borrows = False
            self._give_back(ticket.request.id)

    def _give_back(self, request_id: str) -> None:
        borrower = self._borrowers.pop(request_id, None)
        if borrower is None:
            return
        for loan, (creditor, _, _) in borrower.loans.items():
            for name in (creditor, borrower.home):
                if name in self._ports:
                    self._end_of(name).give_back(loan)

    # ---------------------------------------------------------------- inside

    def _end_of(self, name: str) -> MovingEnd:
        return cast(MovingEnd, self._ports[name])

    def _ask_all(self, borrower: _Borrower) -> None:
        """Another round, of the first of those who are coming."""
        if borrower.ticket.is_cancelled:
            self._settle(borrower, None)
            return
        others = [each for each in self._router.reports.values() if _can_lend(each, borrower.home)]
        kept = sum([count for _, count, _ in borrower.loans.values()])
        if sum([_most(report) for report in others]) < kept + borrower.missing:
            self._settle(borrower, self._too_long(borrower))
            return
        others.sort(key=lambda report: (-report.free_blocks, report.replica))
        borrower.creditors = [report.replica for report in others]
        self._ask(borrower)

    def _ask(self, borrower: _Borrower) -> None:
        while borrower.creditors:
            name = borrower.creditors.pop(0)
            report = self._router.reports.get(name)
            if report is None or name not in self._ports or not _can_lend(report, borrower.home):
                continue  # it was up when it was listed
            count = min(borrower.missing, self._room(report))
            if count < min(borrower.missing, max(1, report.total_blocks // LEAST)):
                continue
            self._count += 1
            borrower.is_asking = True
            told = partial(self._hear, borrower, name, count)
            self._end_of(name).lend(self._count, count, told)
            return
        if borrower.on_ready is not None:
            asyncio.get_running_loop().call_later(AGAIN_S, self._ask_again, borrower)
        elif not borrower.loans:
            self._borrowers.pop(borrower.ticket.request.id, None)
            borrower.ticket.borrows = False

    def _room(self, report: Report) -> int:
        """Blocks that it can lend by its last report; a home keeps the half that its own request works in."""
        total = report.total_blocks
        kept = total // SPARE + 2 * report.num_running + 1  # it has grown since
        room = report.free_blocks - kept
        if any(each.home == report.replica for each in self._borrowers.values() if each.loans):
            lent = report.lent_blocks if isinstance(report.lent_blocks, int) else 0
            room = min(room, total - total // 2 - lent - kept)
        return room

    def _ask_again(self, borrower: _Borrower) -> None:
        if self._coming and self._coming[0] is borrower:
            self._ask_all(borrower)

    def _hear(
        self, borrower: _Borrower, creditor: str, count: int, told: Lent | PenstockError
    ) -> None:
        borrower.is_asking = False
        is_known = self._borrowers.get(borrower.ticket.request.id) is borrower
        if not is_known:  # it was given up meanwhile
            if isinstance(told, Lent) and creditor in self._ports:
                self._end_of(creditor).give_back(told.loan)
            return
        if isinstance(told, Lent) and told.error is None:
            borrower.loans[told.loan] = creditor, count, told.address
            borrower.missing -= count
            if borrower.on_ready is None and borrower.home in self._ports:
                self._tell_home(borrower, told.loan)
        if borrower.missing > 0:
            self._ask(borrower)
        elif borrower.on_ready is not None:
            is_up = borrower.home in self._ports
            self._settle(borrower, None if is_up else self._too_long(borrower))

    def _tell_home(self, borrower: _Borrower, loan: int) -> None:
        _, count, address = borrower.loans[loan]
        self._end_of(borrower.home).borrow(loan, borrower.ticket.request.id, count, address)

    def _settle(self, borrower: _Borrower, error: PenstockError | None) -> None:
        """It is sent or refused now, and the next one is served."""
        on_ready, borrower.on_ready = borrower.on_ready, None
        assert on_ready is not None and self._coming[0] is borrower, "it is not its turn"
        self._coming.popleft()
        if error is not None or borrower.ticket.is_cancelled:
            self._give_back(borrower.ticket.request.id)
        else:
            for loan in borrower.loans:
                self._tell_home(borrower, loan)
        on_ready(error)
        if self._coming:
            self._ask_all(self._coming[0])

    def _too_long(self, borrower: _Borrower) -> ContextTooLong:
        total = sum([report.free_blocks for report in self._router.reports.values()])
        return ContextTooLong(
            f"the request needs more memory than the replicas can lend it: {borrower.missing} blocks "
            f"are missing, and {total} are free in all",
            hint="shorten the prompt or ask for fewer tokens",
            param="prompt",
        )


def _can_lend(report: Report, home: str) -> bool:
    is_up = report.is_alive and not report.is_draining and not report.is_suspect
    return is_up and report.replica != home


def _most(report: Report) -> int:
    """What it could lend if it had nothing else to do."""
    return report.total_blocks - report.total_blocks // SPARE - 2
