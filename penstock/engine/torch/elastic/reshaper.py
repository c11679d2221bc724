"""What an executor whose experts are spread offers to its replica."""

from __future__ import annotations

import asyncio

from penstock.core.reshaping import NewShape, Placing
from penstock.engine.torch.elastic.change import Changes
from penstock.engine.torch.mlp import ExpertLoads
from penstock.policy.move import Policy
from penstock.policy.move.elastic_moe import ElasticMoe
from penstock.policy.move.eplb import Eplb

POLICIES: dict[Placing, type[Policy]] = {"elastic-moe": ElasticMoe, "eplb": Eplb}


class TorchReshaper:
    """Implements core.reshaping.Reshaper. `loads`: what placing by load goes by, since the start."""

    def __init__(self, changes: Changes, loads: ExpertLoads) -> None:
        self.changes, self._loads = changes, loads

    @classmethod
    def of(cls, changes: Changes | None, loads: ExpertLoads | None) -> TorchReshaper | None:
        return None if changes is None or loads is None else cls(changes, loads)

    @property
    def pids(self) -> list[int]:
        return self.changes.spread.pids

    async def reshape(self, devices: int, placing: Placing) -> NewShape:
        """See core.reshaping.Reshaper."""
        layers = self.changes.spread.wanted.layers
        loads = {layer: self._loads.taken[layer].astype(float).tolist() for layer in layers}
        return await asyncio.to_thread(self.changes.reshape, devices, POLICIES[placing](), loads)

    def close(self) -> None:
        self.changes.spread.close()
