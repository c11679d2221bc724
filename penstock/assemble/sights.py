"""Gives a router what its policy wants to see, and tells replicas what they are to say for it."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.assemble.config import Config
from penstock.assemble.presets import policy_tables
from penstock.cluster.predictors import shape_of_model, step_model
from penstock.cluster.sight import Sight, needs
from penstock.cluster.spec import FLEET_SLOTS, policy_of
from penstock.cost.phases import Phases, phases_of
from penstock.engine.reports import Tells


def steering_policies(config: Config, index: int) -> dict[str, object]:
    """What decides for the fleet as a whole, one fresh policy a slot."""
    fleet = config.fleet[index]
    where = f"fleet[{index}].policy"
    tables = policy_tables(fleet.policy, fleet.cache.prefix, where)
    slots = [slot for slot in FLEET_SLOTS if slot in tables]
    return {slot: policy_of(slot, tables[slot], f"{where}.{slot}") for slot in slots}


def tells_of(config: Config, index: int) -> tuple[Tells, ...]:
    """What replicas are to say besides plain reports."""
    policies = steering_policies(config, index).values()
    told: list[Tells] = []
    if needs(policies, "blocks") or config.fleet[index].cache.peers is not None:
        told.append("blocks")
    if needs(policies, "jobs"):
        told.append("jobs")
    if needs(policies, "steady") or config.fleet[index].lends:
        told.append("steady")  # who lends how much is seen by reports, policy or not
    return tuple(told)


def cost_of(config: Config, index: int) -> Phases | None:
    """Predictions for the fleet's policies; None where they need none."""
    if not needs(steering_policies(config, index).values(), "cost"):
        return None
    fleet = config.fleet[index]
    prefill, decode = (
        phases_of(step_model(executor, shape_of_model(fleet.model, executor)))
        for executor in map(fleet.executor_of, ("prefill", "decode"))
    )
    return Phases(prefill=prefill.prefill, decode=decode.decode)


def sight_of(config: Config, index: int, policies: Sequence[object]) -> Sight:
    fleet = config.fleet[index]
    return Sight(
        policies,
        fleet.dispatch,
        cost_of(config, index),
        peers=fleet.cache.peers,
        has_tiers=fleet.cache.tiers.host_bytes is not None,
    )
