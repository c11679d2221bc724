"""Takes a fleet's decisions again: who was sent where, what was moved, how many replicas there were to be.

A router waits for nothing and is called directly, with the inputs of its log at their instants; see lab.replay.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import UNSET, UnsetType

from penstock.cluster.arbiter import MoveRules
from penstock.cluster.router import Router
from penstock.cluster.sight import DispatchConfig, Sight
from penstock.cluster.spec import policy_of
from penstock.cluster.steering import Steering, Steers
from penstock.core.config import build
from penstock.core.errors import BadConfig, BadTrace
from penstock.core.events import (
    Arrived,
    Begun,
    BlocksTold,
    Cancelled,
    Ended,
    Event,
    Header,
    Left,
    Opened,
    Refused,
    Reported,
    Reshaped,
    Routed,
    Scaled,
    Served,
    Steered,
)
from penstock.core.messages import NO_CHANGES, BlockNews, Changes
from penstock.core.moving import Migrated
from penstock.core.types import BlockHash, Request, RequestId, Stage
from penstock.cost.phases import Phases
from penstock.engine.peers import PeersConfig
from penstock.lab.inputs import request_of, stranger_of
from penstock.lab.judge import Judge
from penstock.policy import scale as policy_scale
from penstock.policy.move import Move
from penstock.policy.route.by_stage import ByStage
from penstock.policy.scale import Bounds
from penstock.report.made import MadeFleet


def replay_fleet(events: Iterable[Event], who: str, made: MadeFleet) -> Judge:
    """Replay one fleet's routing. Raises Diverged at the first decision that differs."""
    judge = Judge(who)
    router = _router(who, made, judge)
    steering = _steering(router, made, judge)
    requests: dict[str, Request] = {}
    tried: dict[str, tuple[str, ...]] = {}
    ended: str | None = None
    for event in events:
        if ended is not None and not (isinstance(event, Routed) and event.request == ended):
            requests.pop(ended, None)
            tried.pop(ended, None)
        ended = None
        if isinstance(event, (Header, Opened)):
            continue
        judge.expected.append(event)
        if isinstance(event, Reported):
            router.hear(event.at, event.report)
        elif isinstance(event, Arrived):
            size = next((report.block_size for report in router.reports.values()), 16)
            requests[event.request] = request_of(event, size)
            router.arrive(event.at, requests[event.request])
            steering.arrive(event.at)
        elif isinstance(event, Routed):
            before = tried.get(event.request, ())
            if not isinstance(event.tried, UnsetType):
                _hand_on(router, event, requests[event.request], event.tried)
                continue
            router.choose(event.at, requests[event.request], before)
            left = before if router.again_s is None else ()  # all are asked again
            tried[event.request] = left if event.replica is None else (*before, event.replica)
        elif isinstance(event, BlocksTold | Begun | Left | Migrated | Reshaped):
            _feed_replica(router, event)
            if isinstance(event, Migrated) and event.outcome == "committed":
                tried[event.request] = (event.target,)
        elif isinstance(event, Ended):
            router.end(event.at, event.request, event.replica)
            ended = event.request
        elif isinstance(event, Cancelled):
            router.cancel(event.at, event.request)
        elif isinstance(event, Refused):
            _refuse(router, event)
            requests.pop(event.request, None)
            tried.pop(event.request, None)
        else:
            _steer(steering, event)
    return judge


def _router(who: str, made: MadeFleet, judge: Judge) -> Router:
    """Raises BadTrace."""
    try:
        policy = policy_of("route", made.route, "the route policy of the log")
        second = made.route_decode
        decode = None if second is None else policy_of("route", second, "its decode route policy")
    except BadConfig as error:
        raise BadTrace(f"the log's fleet cannot be made again: {error.message}") from None
    return Router(
        who,
        policy if decode is None else ByStage(policy, decode),  # type: ignore[arg-type]
        log=judge,
        seed=made.seed,
        sight=_sight((policy, decode), made),
    )


def _hand_on(router: Router, event: Routed, request: Request, tried: tuple[str, ...]) -> None:
    stage: Stage = event.stage  # type: ignore[assignment]
    router.hand_on(event.at, request, tried, stage=stage)


def _refuse(router: Router, event: Refused) -> None:
    if event.tenant is None:
        router.refuse(event.at, event.request, event.code, event.why)
    else:
        router.turn_away(event.at, stranger_of(event), event.code, event.why)


def _steering(router: Router, made: MadeFleet, judge: Judge) -> Steering:
    """Raises BadTrace."""
    try:
        mover = None if made.move is None else policy_of("move", made.move, "the log's move policy")
        scaler = (
            None if made.scale is None else policy_of("scale", made.scale, "the log's scale policy")
        )
        steers = Steers(
            mover=mover,  # type: ignore[arg-type]
            scaler=scaler,  # type: ignore[arg-type]
            rules=build(MoveRules, made.rules or {}, "the log's rules"),
            bounds=build(Bounds, made.bounds or {}, "the log's bounds"),
        )
    except BadConfig as error:
        raise BadTrace(f"the log's fleet cannot be made again: {error.message}") from None
    return Steering(router, steers, log=judge, seed=made.seed)


def _steer(steering: Steering, event: Event) -> None:
    """Ask again what was answered, and feed what was served."""
    if isinstance(event, Steered):
        moving = {row[0]: Move(RequestId(row[0]), row[1], row[2], row[3]) for row in event.moving}  # type: ignore[arg-type]
        lent: dict[str, list[tuple[str, int]]] = {}
        for request, creditor, count in () if event.lent is UNSET else event.lent:
            lent.setdefault(request, []).append((creditor, count))
        steering.ask_move(event.at, moving, cause=event.cause, about=event.about, lent=lent)  # type: ignore[arg-type]
    elif isinstance(event, Scaled):
        had = {} if event.had is UNSET else dict(event.had)
        steering.ask_scale(event.at, dict(event.starting), had)  # type: ignore[arg-type]
    elif isinstance(event, Served):
        served = policy_scale.Served(
            event.at,
            event.arrived_at,
            event.ttft_s,
            event.num_prompt,
            event.num_output,
            event.is_refused,
        )
        steering.over(event.at, served)


def _feed_replica(router: Router, event: BlocksTold | Begun | Left | Migrated | Reshaped) -> None:
    if isinstance(event, Reshaped):
        router.write(event)
        return
    if isinstance(event, Migrated):
        router.moved(event)
        return
    if isinstance(event, Left):
        router.forget(event.at, event.replica)
        return
    if isinstance(event, Begun):
        router.begin(event.at, event.request, event.replica)
        return
    stored, removed = _changes((event.stored, event.removed))
    news = BlockNews(stored, removed, _changes(event.host), _changes(event.disk))
    router.tell(event.at, event.replica, news)


def _changes(told: tuple[tuple[str, ...], tuple[str, ...]] | UnsetType) -> Changes:
    if isinstance(told, UnsetType):
        return NO_CHANGES
    stored, removed = (tuple([BlockHash(bytes.fromhex(each)) for each in part]) for part in told)
    return Changes(stored, removed)


def _sight(policies: tuple[object, ...], made: MadeFleet) -> Sight:
    cost = None
    if made.prefill is not None and made.decode is not None:
        cost = Phases(prefill=made.prefill, decode=made.decode)
    return Sight(
        policies,
        build(DispatchConfig, made.dispatch, "the dispatch of the log"),
        cost,
        peers=PeersConfig() if made.finds_peers else None,
        has_tiers=made.has_tiers or False,
    )
