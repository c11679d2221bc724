"""Asks the route policy, keeps what it is asked with, and writes down both, so that routing can be replayed.

State changes only in these calls, and each writes its event at the instant it was given: `hear` (Reported), `tell`
(BlocksTold), `arrive` (Arrived), `choose` (Routed), `begin` (Begun), `end` (Ended), `moved` (Migrated). Replay feeds
the same calls from a log: a Routed follows the Arrived of its request, or an Ended of it when the replica refused or
was lost; `tried` is then every replica the request was routed to before (of one that has moved, the one it has moved
to). The policy is shown the others only, unless it named alternates: the first of them that can take it does.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping

from msgspec import UNSET, UnsetType

from penstock.cluster.sight import Sight
from penstock.core.arrivals import arrival_of
from penstock.core.errors import BadRequest
from penstock.core.events import (
    Begun,
    BlocksTold,
    Cancelled,
    Ended,
    Event,
    Left,
    Refused,
    Reported,
    Routed,
)
from penstock.core.messages import BlockNews, Changes
from penstock.core.moving import Migrated
from penstock.core.ports import Log
from penstock.core.rng import stream
from penstock.core.types import Report, Request, Stage
from penstock.core.views import Move
from penstock.policy import route
from penstock.policy.kept_loads import KeptLoads
from penstock.report.log import Null

STAGE: Stage = "prefill"
_log = logging.getLogger("penstock.cluster")


class Router:
    """One fleet's choice of replicas."""

    def __init__(
        self,
        name: str,
        policy: route.Policy,
        *,
        log: Log,
        seed: int = 0,
        is_checked: bool = False,
        sight: Sight | None = None,
    ) -> None:
        """`sight` None: as the policy needs it, without predictions."""
        self.name = name
        self.reports: dict[str, Report] = {}
        self.outstanding: dict[str, int] = {}
        self._policy = policy
        self._log = log
        self._rng = stream(seed, name, "route")
        self._is_checked = is_checked
        self.sight = Sight((policy,)) if sight is None else sight
        self.moves: tuple[Move, ...] = ()  # that the last decision asked for
        self.held: tuple[str, Mapping[str, int]] = "", {}  # a request, and who had what of it then
        self._alternates: dict[str, tuple[str, ...]] = {}
        self._coming: dict[str, str] = {}  # requests that a replica is about to take over
        self.again_s: float | None = None  # of the last decision
        self._observe = getattr(policy, "observe", None)
        # Events are made only where somebody reads them: of a request they cost more than the choice.
        self._is_read = self._observe is not None or not isinstance(log, Null)
        self._columns = route.Columns([], [])
        self._places: dict[str, int] = {}  # of candidates in the columns
        self._loads = self._loads_of([])

    def hear(self, now: float, report: Report) -> None:
        name = report.replica
        self.reports[name] = report
        self.outstanding.setdefault(name, 0)
        place = self._places.get(name)
        if (place is not None) != route.is_candidate(report, STAGE):
            self._rebuild()
        elif place is not None:
            self._columns.loads[place] = route.load_of(self.outstanding[name], report)
            self._loads.hear(report)
        self.sight.hear(now, report)
        self._emit(Reported(at=now, who=self.name, report=report))

    def forget(self, now: float, replica: str) -> None:
        """The replica is no longer of this fleet."""
        del self.reports[replica]
        assert not self.outstanding.pop(replica), f"{replica} leaves with requests"
        self._rebuild()
        self.sight.forget(replica)
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

    def tell(self, now: float, replica: str, news: BlockNews) -> None:
        """What a replica's blocks hold has changed."""
        if self.sight.blocks is None:
            return
        self.sight.tell(replica, news)
        if not self._is_read:
            return
        stored, removed = _hex(Changes(*news[:2]))
        self._emit(
            BlocksTold(
                at=now, who=self.name, replica=replica, stored=stored, removed=removed,
                host=_hex(news.host) if any(news.host) else UNSET,
                disk=_hex(news.disk) if any(news.disk) else UNSET,
            )
        )  # fmt: skip

    def arrive(self, now: float, request: Request) -> None:
        """Raises BadRequest, and writes nothing, when the prompt has no hashes for blocks of this fleet's size."""
        first = next(iter(self.reports.values()), None)
        try:
            hashes = request.prompt.blocks(16 if first is None else first.block_size)
        except ValueError as error:
            raise BadRequest(str(error), param="prompt") from None
        if self._is_read:
            self._emit(arrival_of(request, at=now, who=self.name, seq=0, hashes=hashes))

    def choose(self, now: float, request: Request, tried: Collection[str] = ()) -> str | None:
        """The replica that takes the request, counted as outstanding there; None = nobody can now.

        `again_s` says after how many seconds the policy wants to be asked once more, if it does.
        """
        stage = self._first_stage(request, tried) if request.parts else STAGE
        view = self._view(now, request, tried, stage)
        decision = self._alternate(view) if tried else None
        if decision is None:
            decision = self._policy.decide(view)
        self._decided(view, decision, UNSET)
        chosen, self.again_s = decision.replica, decision.again_s
        self.moves = decision.moves
        if decision.alternates:
            self._alternates[request.id] = decision.alternates
        if chosen is not None:
            self._count(chosen, 1)
            report = self.reports[chosen]
            hit = 0 if self.sight.blocks is None else view.hit(report)
            if self.sight.peers is not None:
                self.held = request.id, self.sight.held(request, report.block_size)
            self.sight.send(now, request, report, hit)
        return chosen

    def hand_on(
        self, now: float, request: Request, tried: Collection[str], *, stage: Stage
    ) -> str | None:
        """The replica that takes the request over for a later stage; None = it stays where it is.

        It counts as coming until it has it or will not (`moved`).
        """
        view = self._view(now, request, tried, stage)
        if self._coming:
            outstanding = Counter(self.outstanding)
            outstanding.update(self._coming.values())
            view.outstanding = outstanding
        decision = self._policy.decide(view)
        self._decided(view, decision, tuple(tried))
        if decision.replica is not None:
            self._coming[request.id] = decision.replica
        return decision.replica

    def _decided(
        self, view: route.View, decision: route.Decision, tried: tuple[str, ...] | UnsetType
    ) -> None:
        if self._is_checked:
            self._check(view, decision)
        if self._is_read:
            self._emit(
                Routed(
                    at=view.now,
                    who=self.name,
                    request=view.request.id,
                    replica=decision.replica,
                    stage=view.stage,
                    why=decision.why,
                    tried=tried,
                )
            )

    def _first_stage(self, request: Request, tried: Collection[str]) -> Stage:
        """Images are encoded where prompts are computed unless somebody takes that stage."""
        for report in self.reports.values():
            if report.role in ("encode", "encode-decode") and report.replica not in tried:
                if route.is_candidate(report, "encode"):
                    return "encode"
        return STAGE

    def last_seq(self, replica: str) -> int:
        """The number of the request that was routed there last."""
        return self.sight.dispatches.last_seq(replica)

    def _view(
        self, now: float, request: Request, tried: Collection[str], stage: Stage
    ) -> route.View:
        sight, reports = self.sight, list(self.reports.values())
        if tried:
            reports = [report for report in reports if report.replica not in tried]
        return route.View(
            now=now,
            rng=self._rng,
            request=request,
            stage=stage,
            reports=reports,
            outstanding=self.outstanding,
            kept=None if tried or stage != STAGE else self._columns,
            kept_loads=None if tried or stage != STAGE else self._loads,
            sent=sight.sent,
            blocks=sight.blocks,
            cost=sight.cost,
            token_s=sight.token_s,
            ages=sight.ages(now),
            queued=sight.queued,
        )

    def _alternate(self, view: route.View) -> route.Decision | None:
        """The next of those that the policy named for this request; None when none of them can take it."""
        named = self._alternates.pop(view.request.id, ())
        able = {report.replica for report in view.candidates()}
        left = tuple(name for name in named if name in able)
        return route.Decision(left[0], "the next alternate", left[1:]) if left else None

    def _check(self, view: route.View, decision: route.Decision) -> None:
        route.law(view, decision)
        if view.kept is not None:
            loads, view.kept_loads = self._loads, None
            fresh = route.Columns.of(view.candidates(), self.outstanding)
            assert loads.able == view.candidates(), "the candidates kept are not of the reports"
            loads.check()
            assert view.kept == fresh, (
                "the columns kept for the route policy are not those of the reports"
            )

    def begin(self, now: float, request_id: str, replica: str) -> None:
        """The first of a request was heard. Written where somebody goes by it."""
        self._alternates.pop(request_id, None)
        dispatches = self.sight.dispatches
        if dispatches.wants_begin(replica):
            dispatches.begin(request_id, replica)
            if self._is_read:
                self._emit(Begun(at=now, who=self.name, request=request_id, replica=replica))

    def end(self, now: float, request_id: str, replica: str) -> None:
        self._count(replica, -1)
        assert self.outstanding[replica] >= 0, f"{replica} ended more requests than it was given"
        self.sight.dispatches.end(request_id, replica)
        if self._is_read:
            self._emit(Ended(at=now, who=self.name, request=request_id, replica=replica))

    def moved(self, told: Migrated) -> None:
        """A movement is over; a request that has moved counts where it is now."""
        self._coming.pop(told.request, None)
        if told.outcome == "committed":
            self._count(told.source, -1)
            self._count(told.target, 1)
            self.sight.dispatches.moved(told.request, told.source, told.target)
        self._emit(told)

    def cancel(self, now: float, request_id: str) -> None:
        self._emit(Cancelled(at=now, who=self.name, request=request_id))

    def refuse(self, now: float, request_id: str, code: str, why: str) -> None:
        self._alternates.pop(request_id, None)
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
        self._loads = self._loads_of(able)
        self._places = {name: place for place, name in enumerate(self._columns.names)}

    def _loads_of(self, able: list[Report]) -> KeptLoads:
        dispatches = self.sight.dispatches
        return KeptLoads(able, dispatches.sent, dispatches.changed)

    def write(self, event: Event) -> None:
        """Something that happened to the fleet, for its log; nothing here goes by it."""
        self._log.emit(event)

    def _emit(self, event: Event) -> None:
        self._log.emit(event)
        if self._observe is not None:
            try:
                self._observe(event)
            except Exception:  # noqa: BLE001 - the policy's own; what is written here has happened
                _log.exception("the route policy of %s cannot take in %s", self.name, event.kind)


def _hex(change: Changes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    stored, removed = (tuple([each.hex() for each in part]) for part in change)
    return stored, removed
