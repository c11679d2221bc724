"""Gives a router what its policy wants to see, and tells replicas what they are to say for it."""

from __future__ import annotations

from penstock.assemble.config import Config
from penstock.assemble.presets import policy_tables
from penstock.cluster.predictors import shape_of_model, step_model
from penstock.cluster.sight import Sight
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
    if any(getattr(each, "needs_blocks", False) for each in policies):
        told.append("blocks")
    if any(getattr(each, "needs_jobs", False) for each in policies):
        told.append("jobs")
    return tuple(told)


def cost_of(config: Config, index: int) -> Phases | None:
    """Predictions for the route policy; None where it wants none."""
    if not getattr(steering_policies(config, index)["route"], "needs_cost", False):
        return None
    fleet = config.fleet[index]
    return phases_of(step_model(fleet.executor, shape_of_model(fleet.model, fleet.executor)))


def sight_of(config: Config, index: int, policy: object) -> Sight:
    return Sight(policy, config.fleet[index].dispatch, cost_of(config, index))
