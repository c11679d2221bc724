"""Admission that looks ahead, and admission that takes whoever fits now, on one replica with little memory.

The highest rate of Azure's conversations (their own arrivals, stretched) at which 90 % keep both promises, and how
often jobs are preempted at a fixed rate above it, where memory is what everybody waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from penstock.assemble import Config
from penstock.core.events import Event, Finished
from penstock.core.types import Slo
from penstock.lab.rate_search import STEP, RateSearch, fleet_of
from penstock.lab.role_flips import EXECUTOR, MODEL, Turns
from penstock.lab.simulate import simulate

NUM_BLOCKS = 1000
LOW, HIGH = -12, 12  # places on the grid of rates: 0.3 to 3.1 a second
CROWDED = 12  # the place at which preemptions are counted
PROMISE = Slo(ttft_s=2.0, tpot_s=0.06)
ADMISSIONS: dict[str, dict[str, object]] = {
    "256 ahead": {"name": "conservative", "ahead_tokens": 256},
    "greedy": {"name": "full-fit"},
}


def config_of(variant: str) -> Config:
    policy = {"preset": "vllm-v1", "admit": ADMISSIONS[variant]}
    return fleet_of(policy, model=MODEL, executor=EXECUTOR, cache={"num_blocks": NUM_BLOCKS})


@dataclass
class Preempted:
    """How often, and of whom at least once."""

    times: int = 0
    jobs: int = 0

    def emit(self, event: Event) -> None:
        if isinstance(event, Finished):
            self.times += event.num_preemptions
            self.jobs += event.num_preemptions > 0


def crowd(variant: str, *, conv: Path, num: int, seed: int) -> Mapping[str, object]:
    """Figures of one variant on one seed's conversations."""

    def at_rate(rate_per_s: float) -> Turns:
        return Turns(
            kinds=("conv",), code=conv, conv=conv, num=num, rate_per_s=rate_per_s, seed=seed,
            slo=PROMISE,
        )  # fmt: skip

    config, preempted = config_of(variant), Preempted()
    search = RateSearch(config=config, at_rate=at_rate, slo=PROMISE, low=LOW, high=HIGH)
    rate = search.highest()
    simulate(config, at_rate(STEP**CROWDED), has_gaps=False, listeners=(preempted,))
    return {
        "rate": rate,
        "preemptions": preempted.times,
        "preempted_jobs": preempted.jobs,
        "cost_model": search.cost_model,
    }
