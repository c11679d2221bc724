"""Gives a fleet what decides its moves and its size, where the configuration names a policy for that."""

from __future__ import annotations

import dataclasses
from typing import cast

from penstock.assemble.config import Config, FleetConfig
from penstock.assemble.presets import policy_tables
from penstock.assemble.sights import cost_of
from penstock.cluster.arbiter import MoveRules
from penstock.cluster.fleet import Fleet
from penstock.cluster.rounds import Rounds
from penstock.cluster.router import Router
from penstock.cluster.scaling import Scaling, Start
from penstock.cluster.spec import ReplicaSpec, policy_of
from penstock.cluster.steering import Steering, Steers
from penstock.core.ports import Log
from penstock.policy import move, scale
from penstock.policy.scale import Bounds
from penstock.report.made import MadeFleet


def bounds_of(fleet: FleetConfig) -> Bounds:
    """As told, or the number it starts with."""
    return fleet.size or Bounds(least=fleet.replicas, most=fleet.replicas)


def made_fleet(config: Config, index: int) -> MadeFleet:
    """What the fleet's log says of it."""
    fleet = config.fleet[index]
    tables = policy_tables(fleet.policy, fleet.cache.prefix, f"fleet[{index}].policy")
    cost = cost_of(config, index)
    is_steered = "move" in tables or "scale" in tables
    return MadeFleet(
        route=dict(tables["route"]),
        seed=config.seed,
        route_decode=tables.get("route_decode"),
        move=tables.get("move"),
        scale=tables.get("scale"),
        dispatch=dataclasses.asdict(fleet.dispatch),
        prefill=None if cost is None else cost.prefill,
        decode=None if cost is None else cost.decode,
        rules=dataclasses.asdict(fleet.moves or MoveRules()) if is_steered else None,
        bounds=dataclasses.asdict(bounds_of(fleet)) if is_steered else None,
        finds_peers=fleet.cache.peers is not None or None,
        has_tiers=fleet.cache.tiers.host_bytes is not None or None,
    )


def steering_of(config: Config, index: int, router: Router, log: Log) -> Steering | None:
    """None where nothing moves and the size is fixed."""
    fleet, made = config.fleet[index], made_fleet(config, index)
    where = f"fleet[{index}].policy"
    mover = None if made.move is None else policy_of("move", made.move, f"{where}.move")
    scaler = None if made.scale is None else policy_of("scale", made.scale, f"{where}.scale")
    if mover is None and scaler is None:
        return None
    steers = Steers(
        mover=cast(move.Policy | None, mover),
        scaler=cast(scale.Policy | None, scaler),
        rules=fleet.moves or MoveRules(),
        bounds=bounds_of(fleet),
    )
    return Steering(router, steers, log=log, seed=config.seed, is_checked=config.is_checked)


def rounds_of(
    fleet: Fleet, steering: Steering | None, start: Start, spec: ReplicaSpec, count: int
) -> Rounds | None:
    """The clockwork of a fleet that is steered; `spec` and `count` as in cluster.scaling."""
    if steering is None:
        return None
    return Rounds(fleet, steering, mover=fleet, scaling=Scaling(fleet, start, spec, count))
