"""Prompts are computed by some replicas and answers written by others: who hands a request on, and to whom.

A replica of role "prefill" is sent requests that pause behind their first token, if somebody else can write the answer.
When that token is heard the route policy is asked again, for stage "decode", and the chosen replica pulls the request
with its blocks as soon as it has room (cluster.movement); until then the blocks stay where they are, so that what is
not pulled keeps prefill replicas from taking more. When a movement comes to nothing another replica is tried, and when
none is left the request goes on where it is.

Offline requests (priority above 0) stay where their prompt was computed if the fleet's move policy `keeps_offline`, as
it says itself when one goes elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

from penstock.cluster.movement import refusal
from penstock.cluster.moves import Moves
from penstock.cluster.router import Router
from penstock.cluster.steering import Steering
from penstock.core.clock import now
from penstock.core.moving import Migrated
from penstock.core.ports import MovingPort, ReplicaPort
from penstock.core.types import Report
from penstock.policy import route

if TYPE_CHECKING:
    from penstock.cluster.ticket import Ticket

_log = logging.getLogger("penstock.cluster")


class HandOff:
    """One fleet's. `is_open`: whether a ticket is still under way."""

    def __init__(
        self,
        ports: Mapping[str, ReplicaPort],
        router: Router,
        moves: Moves,
        is_open: Callable[[Ticket], bool],
        steering: Steering | None = None,
    ) -> None:
        self._ports, self._router, self._moves, self._is_open = ports, router, moves, is_open
        self._keeps_offline = steering is not None and steering.keeps_offline

    def pauses(self, ticket: Ticket, replica: str) -> bool:
        """Whether a request that goes to this replica is to be handed on from there."""
        if self._router.reports[replica].role != "prefill":
            return False
        if self._keeps_offline and ticket.request.priority > 0:
            return False
        return any(self._can_take(ticket, report) for report in self._router.reports.values())

    def hand_on(self, ticket: Ticket, tried: tuple[str, ...] = ()) -> None:
        """Its first token is there: find it a replica for the others."""
        ticket.pauses = False
        source = ticket.replica
        if self._router.reports[source].role != "prefill":  # it writes answers itself by now
            if not tried:
                cast(MovingPort, self._ports[source]).go_on(ticket.request.id)
            return
        excluded = {source, *tried} | {
            report.replica
            for report in self._router.reports.values()
            if not self._can_take(ticket, report)
        }
        target = self._choose(ticket, tuple(sorted(excluded)))
        if target is None:
            if not tried:  # a movement that came to nothing has told it already
                cast(MovingPort, self._ports[source]).go_on(ticket.request.id)
            return

        def over(told: Migrated) -> None:
            is_here = ticket.replica == source and not ticket.is_cancelled
            if told.outcome != "committed" and is_here and self._is_open(ticket):
                self.hand_on(ticket, (*tried, target))

        self._moves.begin(ticket.request.id, target, "pull", over)

    def _choose(self, ticket: Ticket, excluded: tuple[str, ...]) -> str | None:
        try:
            return self._router.choose(now(), ticket.request, excluded, stage="decode")
        except Exception:  # noqa: BLE001 - the policy's own; the request goes on where it is
            _log.exception("the route policy failed on %s, stage decode", ticket.request.id)
            return None

    def _can_take(self, ticket: Ticket, report: Report) -> bool:
        if report.replica == ticket.replica or not route.is_candidate(report, "decode"):
            return False
        if ticket.replica not in self._ports or report.replica not in self._ports:
            return False
        ports = self._ports[ticket.replica], self._ports[report.replica]
        return refusal(ticket.request, *ports, "pull") is None
