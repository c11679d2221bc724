"""The highest mean rate at which a modelled fleet keeps enough of its promises under some traffic.

`fleet_of` is the fleet: modelled replicas, in roles or all alike, prefixes not cached, keys and values over modelled
wires. `RateSearch` simulates it at one rate after the other, each once, as lab.highest_rate asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from penstock.assemble import Config, load_config
from penstock.core.types import Slo
from penstock.lab.highest_rate import Kept, highest_rate
from penstock.lab.simulate import Traffic, simulate
from penstock.lab.trial import Finishes

KV_BYTES_S = 200e9  # of a replica's wire; NVLink of an A100, two thirds of it
STEP = 1.1  # between rates
WANTED = 0.9  # of the answers


def fleet_of(
    policy: Mapping[str, object],
    *,
    model: str,
    executor: Mapping[str, object],
    replicas: int = 1,
    roles: Mapping[str, int] | None = None,
    cache: Mapping[str, object] | None = None,
) -> Config:
    """`roles` None: all do everything."""
    fleet: dict[str, object] = {
        "name": "default",
        "replicas": replicas,
        "roles": roles,
        "executor": {"kind": "modelled", **executor},
        "cache": {"prefix": False, **(cache or {})},
        "policy": dict(policy),
    }
    flags: dict[str, object] = {f"fleet.0.{name}": told for name, told in fleet.items()}
    return load_config(model=model, flags={**flags, "net.kv_bytes_per_s": KV_BYTES_S})


@dataclass(kw_only=True)
class RateSearch:
    """`at_rate`: the traffic at so many requests a second. `low`, `high`: places on the grid of rates, STEP^place."""

    config: Config
    at_rate: Callable[[float], Traffic]
    slo: Slo
    low: int
    high: int
    digest: str = ""
    cost_model: str = ""
    _known: dict[int, Kept] = field(default_factory=dict)

    def kept(self, place: int) -> Kept:
        found = self._known.get(place)
        if found is None:
            finishes, found = Finishes(), Kept()
            offered = self.at_rate(STEP**place)
            simulated = simulate(self.config, offered, has_gaps=False, listeners=(finishes, found))
            self.digest, self.cost_model = finishes.digest(), simulated.sources[0].cost_model
            self._known[place] = found
        return found

    def attained(self, place: int) -> float:
        assert self.slo.ttft_s is not None and self.slo.tpot_s is not None
        return self.kept(place).attainment(self.slo.ttft_s, self.slo.tpot_s)

    def highest(self) -> float:
        return highest_rate(self.attained, low=self.low, high=self.high, step=STEP, wanted=WANTED)

    def figures(self) -> Mapping[str, object]:
        rate = self.highest()
        return {"rate": rate, "finished": self.digest, "cost_model": self.cost_model}
