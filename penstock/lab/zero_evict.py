"""Admission that looks ahead, and admission that takes whoever fits now, on one replica with little memory.

The highest rate of Azure's conversations (their own arrivals, stretched) at which 90 % keep both promises, and how
often jobs are preempted at a fixed rate above it, where memory is what everybody waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from penstock.assemble import Config, load_config
from penstock.core.events import Event, Finished
from penstock.core.types import Slo
from penstock.lab.highest_rate import Kept, highest_rate
from penstock.lab.role_flips import CARD, MODEL, STEP, TABLES, Turns
from penstock.lab.simulate import simulate

NUM_BLOCKS = 1000
LOW, HIGH = -12, 12  # places on the grid of rates: 0.3 to 3.1 a second
CROWDED = 12  # the place at which preemptions are counted
WANTED = 0.9
PROMISE = Slo(ttft_s=2.0, tpot_s=0.06)
ADMISSIONS: dict[str, dict[str, object]] = {
    "256 ahead": {"name": "conservative", "ahead_tokens": 256},
    "greedy": {"name": "full-fit"},
}


def config_of(variant: str) -> Config:
    fleet: dict[str, object] = {
        "name": "default",
        "executor": {"kind": "modelled", "gpu": CARD, "tables": TABLES},
        "cache": {"prefix": False, "num_blocks": NUM_BLOCKS},
        "policy": {"preset": "vllm-v1", "admit": ADMISSIONS[variant]},
    }
    return load_config(model=MODEL, flags={f"fleet.0.{name}": told for name, told in fleet.items()})


@dataclass
class Preempted:
    """How often, and of whom at least once."""

    times: int = 0
    jobs: int = 0

    def emit(self, event: Event) -> None:
        if isinstance(event, Finished):
            self.times += event.num_preemptions
            self.jobs += event.num_preemptions > 0


@dataclass
class Crowd:
    """One variant on one seed's conversations."""

    variant: str
    conv: Path
    num: int
    seed: int
    cost_model: str = ""
    _kept: dict[int, float] = field(default_factory=dict)

    def _run(self, place: int) -> tuple[float, Preempted]:
        offered = Turns(
            kinds=("conv",), code=self.conv, conv=self.conv, num=self.num, rate_per_s=STEP**place,
            seed=self.seed, slo=PROMISE,
        )  # fmt: skip
        kept, preempted = Kept(), Preempted()
        simulated = simulate(
            config_of(self.variant), offered, has_gaps=False, listeners=(kept, preempted)
        )
        self.cost_model = simulated.sources[0].cost_model
        assert PROMISE.ttft_s is not None and PROMISE.tpot_s is not None
        return kept.attainment(PROMISE.ttft_s, PROMISE.tpot_s), preempted

    def attained(self, place: int) -> float:
        if place not in self._kept:
            self._kept[place] = self._run(place)[0]
        return self._kept[place]

    def figures(self) -> Mapping[str, object]:
        rate = highest_rate(self.attained, low=LOW, high=HIGH, step=STEP, wanted=WANTED)
        preempted = self._run(CROWDED)[1]
        return {
            "rate": rate,
            "preemptions": preempted.times,
            "preempted_jobs": preempted.jobs,
            "cost_model": self.cost_model,
        }
