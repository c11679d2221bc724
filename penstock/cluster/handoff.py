"""Images are encoded by some replicas, prompts computed by others and answers written by again others: who hands a
request on, and to whom.

A replica of role "prefill" is sent requests that pause behind their first token, if somebody else can write the answer.
When that token is heard the route policy is asked again, for stage "decode", and the chosen replica pulls the request
with its blocks as soon as it has room (cluster.movement); until then the blocks stay where they are, so that what is
not pulled keeps prefill replicas from taking more. When a movement comes to nothing another replica is tried, and when
none is left the request goes on where it is.

A request with images goes first to a replica that encodes, where there is one. There it pauses when its images are
encoded, and is handed on with their embeddings, for stage "prefill"; at a replica of role "prefill" it pauses again.

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
from penstock.core.types import Report, Request, Role, Stage
from penstock.policy import route

if TYPE_CHECKING:
    from penstock.cluster.ticket import Ticket

PAUSING: Mapping[Stage, tuple[Role, ...]] = {  # who leaves a stage to others
    "prefill": ("encode", "encode-decode"),
    "decode": ("prefill",),
}
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

    def pauses(self, ticket: Ticket, replica: str) -> Stage | None:
        """Before which stage a request that goes to this replica is to stand still and be handed on from there.

        One with blocks elsewhere stays where it is (cluster.lendings).
        """
        if ticket.borrows:
            return None
        role = self._router.reports[replica].role
        if ticket.request.parts and role in PAUSING["prefill"]:
            return "prefill" if self._has_taker(ticket.request, replica, "prefill") else None
        if role not in PAUSING["decode"]:
            return None
        if self._keeps_offline and ticket.request.priority > 0:
            return None
        return "decode" if self._has_taker(ticket.request, replica, "decode") else None

    def hand_on(self, ticket: Ticket) -> None:
        """It stands still: find it a replica for the stage that comes."""
        stage, ticket.pauses = ticket.pauses, None
        assert stage is not None, "it does not pause"
        self._pass_on(ticket, stage, ())

    def _pass_on(
        self, ticket: Ticket, stage: Stage, tried: tuple[str, ...], *, stands: bool = True
    ) -> None:
        """`stands`: no movement that began, and came to nothing, has told it to go on."""
        source, request = ticket.replica, ticket.request
        target = None
        if not route.takes(self._router.reports[source].role, stage):  # else it does so by now
            excluded = {source, *tried} | {
                report.replica
                for report in self._router.reports.values()
                if not self._can_take(request, source, report, stage)
            }
            target = self._choose(ticket, stage, tuple(sorted(excluded)))
        if target is None:
            if stands:
                cast(MovingPort, self._ports[source]).go_on(request.id)
            return
        pauses = self.pauses(ticket, target) if stage == "prefill" else None

        def over(told: Migrated) -> None:
            if told.outcome == "committed":
                ticket.pauses = pauses
            elif told.outcome in ("source_lost", "finished_first"):
                return  # the fleet places it anew, or it has ended
            elif ticket.replica == source and not ticket.is_cancelled and self._is_open(ticket):
                still = stands and told.outcome == "refused"
                self._pass_on(ticket, stage, (*tried, target), stands=still)

        self._moves.begin(request.id, target, "pull", over, pauses=pauses)

    def _choose(self, ticket: Ticket, stage: Stage, excluded: tuple[str, ...]) -> str | None:
        try:
            return self._router.hand_on(now(), ticket.request, excluded, stage=stage)
        except Exception:  # noqa: BLE001 - the policy's own; the request goes on where it is
            _log.exception("the route policy failed on %s, stage %s", ticket.request.id, stage)
            return None

    def _has_taker(self, request: Request, source: str, stage: Stage) -> bool:
        reports = self._router.reports.values()
        return any(self._can_take(request, source, report, stage) for report in reports)

    def _can_take(self, request: Request, source: str, report: Report, stage: Stage) -> bool:
        if report.replica == source or not route.is_candidate(report, stage):
            return False
        if source not in self._ports or report.replica not in self._ports:
            return False
        ports = self._ports[source], self._ports[report.replica]
        return refusal(request, *ports, "pull") is None
