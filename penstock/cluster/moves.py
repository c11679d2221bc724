"""The movements of one fleet: which may begin, and what becomes of the ticket when one is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

from penstock.cluster.movement import MoveBounds, Movement, refusal
from penstock.cluster.router import Router
from penstock.core.clock import now
from penstock.core.moving import Migrated, MoveMode, MoveOutcome
from penstock.core.ports import MovingPort, ReplicaPort
from penstock.core.types import Report, Stage
from penstock.policy.move import Move

if TYPE_CHECKING:
    from penstock.cluster.ticket import Ticket

AWAY_AT_ONCE = 2  # requests that move away from a replica that drains
OnOver = Callable[[Migrated], None]


class Moves:
    """`tickets` by request, those of the fleet."""

    def __init__(
        self,
        ports: Mapping[str, ReplicaPort],
        router: Router,
        tickets: Mapping[str, Ticket],
        bounds: MoveBounds,
    ) -> None:
        self._ports, self._router, self._tickets, self._bounds = ports, router, tickets, bounds
        self._count = 0
        self.under_way: dict[str, Move] = {}  # by request

    def begin(
        self,
        request_id: str,
        target: str,
        mode: MoveMode,
        on_over: OnOver | None = None,
        *,
        pauses: Stage | None = None,
    ) -> None:
        """See Fleet.move. `pauses`: before which stage it stands still at the target."""
        ticket = self._tickets.get(request_id)
        why = self._why_not(ticket, target, mode)
        if ticket is None or why is not None:
            told = Migrated(
                at=now(),
                who=self._router.name,
                request=request_id,
                source="" if ticket is None else ticket.replica,
                target=target,
                mode=mode,
                outcome="refused",
                why=why or "",
                asked_at=now(),
            )
            self._router.moved(told)
            if on_over is not None:
                on_over(told)
            return
        self._count += 1
        movement = ticket.movement = Movement(
            self._count,
            ticket,
            cast(MovingPort, self._ports[ticket.replica]),
            cast(MovingPort, self._ports[target]),
            mode=mode,
            bounds=self._bounds,
        )
        movement.pauses = pauses
        self.under_way[request_id] = Move(ticket.request.id, ticket.replica, target, mode)

        def over(outcome: MoveOutcome, why: str) -> None:
            told = movement.told(self._router.name, outcome, why)
            self._settle(ticket, movement, told)
            if on_over is not None:
                on_over(told)

        movement.begin(over)

    def _why_not(self, ticket: Ticket | None, target: str, mode: MoveMode) -> str | None:
        """Why a request cannot move there now."""
        if ticket is None or ticket.is_cancelled:
            return "it has ended"
        if ticket.movement is not None:
            return "it is moving already"
        if ticket.borrows:
            return "a part of its context lies with other replicas"
        if target not in self._ports:
            return f"there is no replica {target!r}"
        if target == ticket.replica:
            return f"it is at {target} already"
        report = self._router.reports.get(target)
        if report is None or not report.is_alive or report.is_draining:
            return f"{target} takes no requests"
        return refusal(ticket.request, self._ports[ticket.replica], self._ports[target], mode)

    def _settle(self, ticket: Ticket, movement: Movement, told: Migrated) -> None:
        """The ticket is where it has moved to, or where it was."""
        ticket.movement = None
        del self.under_way[ticket.request.id]
        self._router.moved(told)
        if told.outcome == "committed":
            ticket.replica, ticket.tried = told.target, (told.target,)
        elif movement.lost is not None and told.outcome != "source_lost":
            ticket.fail(movement.lost)

    # ---------------------------------------------------------------- draining

    async def send_away(self, name: str) -> None:
        """Move the requests of a replica elsewhere, each tried once."""
        tried: set[str] = set()
        await asyncio.gather(*(self._send(name, tried) for _ in range(AWAY_AT_ONCE)))

    async def _send(self, name: str, tried: set[str]) -> None:
        while True:
            ticket = next(
                filter(lambda each: _can_leave(each, name, tried), self._tickets.values()), None
            )
            target = None if ticket is None else self._emptiest(ticket)
            if ticket is None or target is None:
                return
            tried.add(ticket.request.id)
            over: asyncio.Future[Migrated] = asyncio.get_running_loop().create_future()
            mode: MoveMode = "live" if ticket.is_heard else "queued"
            self.begin(ticket.request.id, target, mode, over.set_result)
            await over

    def _emptiest(self, ticket: Ticket) -> str | None:
        """Of the other replicas, the one with the fewest requests; those of its stage's role first."""
        stage: Stage = "decode" if ticket.is_heard else "prefill"

        def rank(report: Report) -> tuple[bool, int]:
            return report.role not in ("any", stage), self._router.outstanding[report.replica]

        able = [
            report
            for report in self._router.reports.values()
            if report.is_alive and not report.is_draining and not report.is_suspect
        ]
        others = [report for report in able if report.replica != ticket.replica]
        return min(others, key=rank).replica if others else None


def _can_leave(ticket: Ticket, name: str, tried: set[str]) -> bool:
    is_here = ticket.replica == name and ticket.movement is None
    return is_here and not ticket.is_cancelled and ticket.request.id not in tried
