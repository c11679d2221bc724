"""Asks what moves and how many replicas there are to be, and writes down both, so that both can be replayed.

State changes only in these calls, as in cluster.router whose reports and counts it shows to the policies. A question
that was answered with "nothing" leaves no event: whoever replays asks only where something was decided. So a policy
changes its own state where it decides something and in what it observes, and the draws of a question come from a
stream of its own.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from msgspec import UNSET
from msgspec.structs import astuple, replace

from penstock.cluster.arbiter import MoveRules, Refused, sift, sift_loans
from penstock.cluster.router import Router
from penstock.core.events import Event, Scaled, Served, Steered
from penstock.core.ports import Log
from penstock.core.rng import stream
from penstock.core.types import Role
from penstock.policy import move, scale
from penstock.policy.move import Cause, Loan, Move
from penstock.policy.scale import Bounds

_log = logging.getLogger("penstock.cluster")
Moving = Mapping[str, Move]  # by request
Lent = Mapping[str, Sequence[tuple[str, int]]]  # by request, creditors and blocks


@dataclass(frozen=True, kw_only=True)
class Steers:
    """Who decides, within which rules. None: that question is never asked."""

    mover: move.Policy | None = None
    scaler: scale.Policy | None = None
    rules: MoveRules = MoveRules()
    bounds: Bounds = Bounds()


class Steering:
    """One fleet's choice of what moves and of its size."""

    def __init__(
        self, router: Router, steers: Steers, *, log: Log, seed: int = 0, is_checked: bool = False
    ) -> None:
        self._router, self._log, self._is_checked = router, log, is_checked
        self._mover, self._scaler = mover, scaler = steers.mover, steers.scaler
        self._rules, self._bounds = steers.rules, steers.bounds
        self._seed = seed
        self._moved_at: dict[str, float] = {}  # of requests that may not move again yet
        self._window_s: float | None = getattr(scaler, "window_s", None)
        self._served: deque[scale.Served] = deque()
        self._arrivals: deque[float] = deque()
        self._observers = [each for each in map(_observer, (mover, scaler)) if each is not None]

    @property
    def move_every_s(self) -> float | None:
        """None: what moves is decided on events alone, or never."""
        return getattr(self._mover, "every_s", None)

    @property
    def scale_every_s(self) -> float | None:
        return getattr(self._scaler, "every_s", None)

    @property
    def hears_tokens(self) -> bool:
        """The scale policy goes by first tokens, also of callers who wait for whole answers."""
        return bool(getattr(self._scaler, "hears_tokens", False))

    @property
    def keeps_offline(self) -> bool:
        """The move policy takes offline requests from where their prompts were computed."""
        return bool(getattr(self._mover, "keeps_offline", False))

    @property
    def causes(self) -> frozenset[Cause]:
        """What the move policy wants to be asked on, beside the passing of time."""
        return frozenset(getattr(self._mover, "causes", ()))

    # ---------------------------------------------------------------- what happens

    def arrive(self, now: float) -> None:
        if self._window_s is not None:
            self._arrivals.append(now)

    def over(self, now: float, served: scale.Served) -> None:
        """A request has ended, however it did."""
        if self._window_s is not None:
            self._served.append(served)
            self._tell(
                Served(
                    at=now,
                    who=self._router.name,
                    arrived_at=served.arrived_at,
                    ttft_s=served.ttft_s,
                    num_prompt=served.num_prompt,
                    num_output=served.num_output,
                    is_refused=served.is_refused,
                )
            )

    # ---------------------------------------------------------------- what is decided

    def ask_move(
        self,
        now: float,
        moving: Moving,
        *,
        cause: Cause = "tick",
        about: str = "",
        lent: Lent | None = None,
    ) -> move.Decision:
        """The moves that are to begin now, the loans that are to be made and those that are called back."""
        if self._mover is None:
            return move.Decision()
        reports = self._router.reports
        view = move.View(
            now=now,
            rng=stream(self._seed, self._router.name, "move", repr(now)),
            reports=list(reports.values()),
            outstanding=self._router.outstanding,
            moving={request: each.target for request, each in moving.items()},
            cause=cause,
            about=about,
            lent=lent or {},
            cost=self._router.sight.cost,
        )
        decision = self._mover.decide(view)
        if self._is_checked:
            move.law(view, decision)
        if not (decision.moves or decision.loans or decision.recalls):
            return decision
        kept, denied = sift(
            decision.moves,
            now=now,
            reports=reports,
            under_way=[(m.source, m.target) for m in moving.values() if m.mode != "queued"],
            moved_at=self._moved_at,
            rules=self._rules,
        )
        since = now - self._rules.cooldown_s
        self._moved_at = {name: at for name, at in self._moved_at.items() if at > since}
        self._moved_at |= {each.request: now for each in kept}
        loans, late = sift_loans(decision.loans, now=now, reports=reports, rules=self._rules)
        decision = replace(decision, moves=tuple(kept), loans=loans)
        self._tell(self._steered(now, view, moving, decision, [*denied, *late]))
        return decision

    def ask_scale(
        self, now: float, starting: Mapping[Role, int], devices: Mapping[str, int] | None = None
    ) -> scale.Decision:
        """What is to change about the replicas. `devices`: of those that can have more or fewer."""
        if self._scaler is None:
            return scale.Decision()
        self._forget_before(now)
        view = scale.View(
            now=now,
            rng=stream(self._seed, self._router.name, "scale", repr(now)),
            reports=list(self._router.reports.values()),
            outstanding=self._router.outstanding,
            bounds=self._bounds,
            starting=starting,
            served=self._served,
            arrived=len(self._arrivals),
            devices=devices or {},
            cost=self._router.sight.cost,
            token_s=self._router.sight.token_s,
        )
        decision = self._scaler.decide(view)
        if self._is_checked:
            scale.law(view, decision)
        if decision.add or decision.drain or decision.roles or decision.devices:
            self._tell(
                Scaled(
                    at=now,
                    who=self._router.name,
                    starting=tuple(sorted(starting.items())),
                    add=tuple(decision.add.items()),
                    drain=decision.drain,
                    roles=tuple(decision.roles.items()),
                    had=tuple((devices or {}).items()) or UNSET,
                    devices=tuple(decision.devices.items()) or UNSET,
                    why=decision.why,
                )
            )
        return decision

    # ---------------------------------------------------------------- inside

    def _steered(
        self,
        now: float,
        view: move.View,
        moving: Moving,
        decision: move.Decision,
        denied: Sequence[Refused],
    ) -> Steered:
        lent = [(request, *each) for request, told in view.lent.items() for each in told]
        return Steered(
            at=now,
            who=self._router.name,
            cause=view.cause,
            about=view.about,
            moving=tuple(_row(each) for each in moving.values()),
            moves=tuple(_row(each) for each in decision.moves),
            denied=tuple((*_row(each), rule) for each, rule in denied),
            why=decision.why,
            lent=tuple(lent) or UNSET,
            loans=tuple([astuple(each) for each in decision.loans]) or UNSET,
            recalls=tuple([astuple(each) for each in decision.recalls]) or UNSET,
        )

    def _forget_before(self, now: float) -> None:
        if self._window_s is None:
            return
        since = now - self._window_s
        while self._served and self._served[0].at < since:
            self._served.popleft()
        while self._arrivals and self._arrivals[0] < since:
            self._arrivals.popleft()

    def _tell(self, event: Event) -> None:
        self._log.emit(event)
        for observe in self._observers:
            try:
                observe(event)
            except Exception:  # noqa: BLE001 - the policy's own; what is written here has happened
                _log.exception("a policy of %s cannot take in %s", self._router.name, event.kind)


def _observer(policy: object) -> Callable[[Event], None] | None:
    return getattr(policy, "observe", None)


def _row(each: Move | Loan) -> tuple[str, str, str, str]:
    if isinstance(each, Loan):
        return (each.request, each.debtor, each.creditor, "lend")
    return (each.request, each.source, each.target, each.mode)
