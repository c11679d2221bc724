"""The executor of a modelled replica with a vision tower."""

from __future__ import annotations

from typing import Any

from penstock.assemble.vision import vision_of
from penstock.cluster.spec import ReplicaSpec
from penstock.core.errors import BadConfig
from penstock.core.types import Caps
from penstock.cost.step import StepModel
from penstock.sim.encoding import EncodingExecutor


def encoding(
    spec: ReplicaSpec, model: StepModel, caps: Caps, more: dict[str, Any]
) -> EncodingExecutor:
    """Raises BadConfig."""
    executor = spec.executor
    is_plain = spec.speculation is None and executor.expert_devices is None and not caps.lends
    if not is_plain or caps.max_lanes > 1:
        raise BadConfig(
            "executor.vision goes with neither speculation, lends, expert_devices nor several lanes",
            hint="leave one of them out",
        )
    return EncodingExecutor(model, vision_of(executor), caps=caps, **more)
