"""Replicas that take images: modelled ones with a vision tower (`executor.vision`)."""

from __future__ import annotations

from collections.abc import Mapping

from penstock import policy
from penstock.cluster.spec import ExecutorSpec
from penstock.core.errors import BadConfig
from penstock.cost.energy import at_clock
from penstock.cost.hardware import card_of
from penstock.cost.vision import VisionCost, tower_of

ENCODING = ("encode", "encode-decode")


def check_images(
    executor: ExecutorSpec, roles: Mapping[str, int], batch: Mapping[str, object], where: str
) -> None:
    """Raises BadConfig where roles ask for what replicas cannot do."""
    if executor.vision is not None:
        tower_of(executor.vision)
    named = next((role for role in ENCODING if roles.get(role)), None)
    if named is None:
        return
    if executor.vision is None:
        raise BadConfig(
            f"{where}.roles: {named!r} is for replicas that take images, and these have no vision tower",
            hint=f'name one, as in {where}.executor.vision="qwen2-vl" (simulated only), or leave the role out',
        )
    if not getattr(policy.find("batch", str(batch["name"])), "encodes", False):
        raise BadConfig(
            f"{where}.roles: {named!r} needs a batch policy that encodes images apart from prompts",
            hint=f'set {where}.policy.batch="epd"',
        )


def vision_of(executor: ExecutorSpec) -> VisionCost:
    """What encoding takes there. Raises BadConfig."""
    if executor.gpu is None or executor.vision is None:
        raise BadConfig(
            "executor.vision needs `gpu`, the card whose peaks its times are made of",
            hint='for example --set fleet.0.executor.gpu="a100-80g"',
        )
    card = at_clock(card_of(executor.gpu), executor.clock)
    return VisionCost(tower_of(executor.vision), card, tp=executor.tensor_parallel)


def tower_blocks(executor: ExecutorSpec, block_bytes: float) -> int:
    """Blocks whose room the tower's weights take."""
    if executor.vision is None:
        return 0
    return -(-tower_of(executor.vision).weight_bytes // max(1, int(block_bytes)))
