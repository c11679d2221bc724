"""Asks the route policy, keeps what it is asked with, and writes down both, so that routing can be replayed.

State changes only in these calls, and each writes its event at the instant it was given: `hear` (Reported), `arrive`
(Arrived), `choose` (Routed), `end` (Ended), `moved` (Migrated). Replay feeds the same calls from a log: a Routed
follows the Arrived of its request, or an Ended of it when the replica refused or was lost; `tried` is then every
replica the request was routed to before (of one that has moved, the one it has moved to), and the policy is shown the
others only.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from penstock.core.errors import BadRequest
from penstock.core.events import (
    Arrived,
    Cancelled,
    Ended,
    Event,
    Left,
    Refused,
    Reported,
    Routed,
)
from penstock.core.moving import Migrated
from penstock.core.ports import Log
from penstock.core.rng import stream
from penstock.core.types import Report, Request, Stage
from penstock.policy import route

STAGE: Stage = "prefill"
_log = logging.getLogger("penstock.cluster")


class Router:
    """One fleet's choice of replicas."""

    def __init__(
        self, name: str, policy: route.Policy, *, log: Log, seed: int = 0, is_checked: bool = False
    ) -> None:
        self.name = name
        self.reports: dict[str, Report] = {}
        self.outstanding: dict[str, int] = {}
        self._policy = policy
        self._log = log
        self._rng = stream(seed, name, "route")
        self._is_checked = is_checked
        self._observe = getattr(policy, "observe", None)
        self._columns = route.Columns([], [])
        self._places: dict[str, int] = {}  # of candidates in the columns

    def hear(self, now: float, report: Report) -> None:
        name = report.replica
        self.reports[name] = report
        self.outstanding.setdefault(name, 0)
        place = self._places.get(name)
        if (place is not None) != route.is_candidate(report, STAGE):
            self._rebuild()
        elif place is not None:
            self._columns.loads[place] = route.load_of(self.outstanding[name], report)
        self._emit(Reported(at=now, who=self.name, report=report))

    def forget(self, now: float, replica: str) -> None:
        """The replica is no longer of this fleet."""
        del self.reports[replica]
        assert not self.outstanding.pop(replica), f"{replica} leaves with requests"
        self._rebuild()
        self._emit(Left(at=now, who=self.name, replica=replica))

    def has_other(self, report: Report) -> bool:
        """Whether another replica of the same role can take requests."""
        return any(
            each.replica != report.replica
            and each.role == report.role
            and each.is_alive
            and not (each.is_draining or each.is_suspect)
            for each in self.reports.values()
        )

    def arrive(self, now: float, request: Request) -> None:
        """Raises BadRequest, and writes nothing, when the prompt has no hashes for blocks of this fleet's size."""
        first = next(iter(self.reports.values()), None)
        try:
            hashes = request.prompt.blocks(16 if first is None else first.block_size)
        except ValueError as error:
            raise BadRequest(str(error), param="prompt") from None
        self._emit(Arrived.of(request, at=now, who=self.name, seq=0, hashes=hashes))

    def choose(self, now: float, request: Request, tried: Collection[str] = ()) -> str | None:
        """The replica that takes the request, counted as outstanding there; None = nobody can now."""
        reports = list(self.reports.values())
        if tried:
            reports = [report for report in reports if report.replica not in tried]
        kept = None if tried else self._columns
        view = route.View(
            now=now,
            rng=self._rng,
            request=request,
            stage=STAGE,
            reports=reports,
            outstanding=self.outstanding,
            kept=kept,
        )
        decision = self._policy.decide(view)
        if self._is_checked:
            route.law(view, decision)
            if kept is not None:
                fresh = route.Columns.of(view.candidates(), self.outstanding)
                assert kept == fresh, (
                    "the columns kept for the route policy are not those of the reports"
                )
        chosen = decision.replica
        self._emit(
            Routed(
                at=now,
                who=self.name,
                request=request.id,
                replica=chosen,
                stage=STAGE,
                why=decision.why,
            )
        )
        if chosen is not None:
            self._count(chosen, 1)
        return chosen

    def end(self, now: float, request_id: str, replica: str) -> None:
        self._count(replica, -1)
        assert self.outstanding[replica] >= 0, f"{replica} ended more requests than it was given"
        self._emit(Ended(at=now, who=self.name, request=request_id, replica=replica))

    def moved(self, told: Migrated) -> None:
        """A movement is over; a request that has moved counts where it is now."""
        if told.outcome == "committed":
            self._count(told.source, -1)
            self._count(told.target, 1)
        self._emit(told)

    def cancel(self, now: float, request_id: str) -> None:
        self._emit(Cancelled(at=now, who=self.name, request=request_id))

    def refuse(self, now: float, request_id: str, code: str, why: str) -> None:
        self._emit(Refused(at=now, who=self.name, request=request_id, code=code, why=why))

    def turn_away(self, now: float, request: Request, code: str, why: str) -> None:
        """Refuse a request that has not arrived."""
        self._emit(
            Refused(
                at=now,
                who=self.name,
                request=request.id,
                code=code,
                why=why,
                tenant=request.tenant,
                priority=request.priority,
                slo=request.slo,
                n=request.n,
            )
        )

    def _count(self, replica: str, change: int) -> None:
        self.outstanding[replica] += change
        place = self._places.get(replica)
        if place is not None:
            self._columns.loads[place] += change * route.ONE_OUTSTANDING

    def _rebuild(self) -> None:
        able = [each for each in self.reports.values() if route.is_candidate(each, STAGE)]
        self._columns = route.Columns.of(able, self.outstanding)
        self._places = {name: place for place, name in enumerate(self._columns.names)}

    def _emit(self, event: Event) -> None:
        self._log.emit(event)
        if self._observe is not None:
            try:
                self._observe(event)
            except Exception:  # noqa: BLE001 - the policy's own; what is written here has happened
                _log.exception("the route policy of %s cannot take in %s", self.name, event.kind)
