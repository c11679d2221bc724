"""Requests longer than one replica's memory: which others keep blocks for them, and until when.

A request that comes and may need more blocks than its replica keeps for one (half of its memory, the rest being for
others) is placed as ever; before it is sent, blocks are reserved with the other replicas, those with the most free
blocks first. A replica that has less room than its last report said lends nothing, and the next one is asked. With
enough reserved the home is told of the loans, then gets the request; without, all are given back and the caller is
told. From then on home and creditors deal with each other; a loan is over when the request is, however it ends.

`lend` does the same for a request that runs: the debtor's batch grows by what it can move out of its memory.

Conflict with movements: a request with blocks elsewhere stays where it is.
"""

from __future__ import annotations

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
OnReady = Callable[[PenstockError | None], None]


@dataclass(slots=True)
class _Borrower:
    """What one request has, and still looks for."""

    request: Request
    home: str
    missing: int
    on_ready: OnReady
    creditors: list[str]  # to be asked yet
    loans: dict[int, tuple[str, int, str]] = field(default_factory=dict)  # creditor, blocks, where
    asked: int | None = None


class Lendings:
    """One per fleet. Where `is_on` is not set, nobody lends."""

    def __init__(self, ports: Mapping[str, ReplicaPort], router: Router, *, is_on: bool) -> None:
        self._is_on = is_on
        self._ports, self._router = ports, router
        self._count = 0
        self._borrowers: dict[str, _Borrower] = {}

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
        request = ticket.request
        missing = self.missing(request, home) if self._is_on else 0
        if not missing:
            return False
        ticket.replica, ticket.borrows = home, True
        others = [report for report in self._router.reports.values() if _can_lend(report, home)]
        others.sort(key=lambda report: (-report.free_blocks, report.replica))
        names = [report.replica for report in others]
        self._borrowers[request.id] = _Borrower(request, home, missing, on_ready, names)
        self._ask(self._borrowers[request.id])
        return True

    def lend(self, ticket: Ticket, creditor: str, num_blocks: int) -> None:
        """One creditor keeps up to so many blocks of a request that runs, if it has the room."""
        request, is_new = ticket.request, ticket.request.id not in self._borrowers
        if self._is_on and is_new and request.n == 1 and creditor != ticket.replica:
            ticket.borrows = True
            self._borrowers[request.id] = _Borrower(
                request, ticket.replica, num_blocks, lambda error: None, [creditor]
            )
            self._ask(self._borrowers[request.id])

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

    def _ask(self, borrower: _Borrower) -> None:
        while borrower.creditors:
            name = borrower.creditors.pop(0)
            report = self._router.reports.get(name)
            if report is None or name not in self._ports:
                continue
            room = report.free_blocks - report.total_blocks // SPARE - report.num_running - 1
            count = min(borrower.missing, room)
            if count < 1:
                continue
            self._count += 1
            loan = borrower.asked = self._count
            self._end_of(name).lend(loan, count, partial(self._hear, borrower, name, count))
            return
        self._fail(borrower)

    def _hear(
        self, borrower: _Borrower, creditor: str, count: int, told: Lent | PenstockError
    ) -> None:
        is_known = self._borrowers.get(borrower.request.id) is borrower
        if not is_known:  # it was given up meanwhile
            if isinstance(told, Lent) and creditor in self._ports:
                self._end_of(creditor).give_back(told.loan)
            return
        if isinstance(told, Lent) and told.error is None:
            borrower.loans[told.loan] = creditor, count, told.address
            borrower.missing -= count
        if borrower.missing > 0:
            self._ask(borrower)
            return
        home = self._ports.get(borrower.home)
        if home is None:
            self._fail(borrower)
            return
        for loan, (_, num, address) in borrower.loans.items():
            cast(MovingEnd, home).borrow(loan, borrower.request.id, num, address)
        borrower.on_ready(None)

    def _fail(self, borrower: _Borrower) -> None:
        self._give_back(borrower.request.id)
        total = sum([report.free_blocks for report in self._router.reports.values()])
        borrower.on_ready(
            ContextTooLong(
                f"the request needs more memory than the replicas can lend it: {borrower.missing} blocks "
                f"are missing, and {total} are free in all",
                hint="shorten the prompt, ask for fewer tokens, or try again when others have ended",
                param="prompt",
            )
        )


def _can_lend(report: Report, home: str) -> bool:
    is_up = report.is_alive and not report.is_draining and not report.is_suspect
    return is_up and report.replica != home
