"""How evenly experts are spread over devices by plans made from some tokens, on other tokens of published routing.

Peak over mean of the devices' loads, a mean over layers and tasks; 1 is perfect. Routing: which 6 of 64 experts each
token of four tasks took in some layers (deepseek-ai/ESFT, DeepSeek-V2-Lite).
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.core.rng import stream
from penstock.lab.experiment import Scale, mean
from penstock.policy.move import Experts, Slots
from penstock.policy.move.eplb import deal, peak

TASKS, LAYERS, EXPERTS = ("intent", "law", "summary", "translation"), (2, 8, 14, 20, 26), 64
DEVICES = (4, 8, 16)
PLANS = ("contiguous", "lpt", "in-sample", "held-out", "other tasks")
Counts = NDArray[np.int64]


@functools.cache
def _sequences(path: Path) -> tuple[Counts, ...]:
    """Rows that each expert took of each sequence."""
    with gzip.open(path, "rt") as file:
        lines = file.read().splitlines()
    found = []
    for line in lines:
        ids, _, weights = line.partition("\t\t")
        if weights:
            chosen = np.array(ids.split("\t"), dtype=np.int64)
            found.append(np.bincount(chosen, minlength=EXPERTS))
    return tuple(found)


@dataclass(frozen=True)
class Routed:
    """Loads of one layer: of the half that plans are made from, the other half of the task, and all of other tasks."""

    plan: Counts
    test: Counts
    others: Counts


@dataclass
class Balance:
    """`seed` says which sequences are in which half."""

    scale: Scale
    seed: int

    def figures(self) -> Mapping[str, object]:
        """By "plan devices"."""
        loads = [self._routed(task, layer) for task in TASKS for layer in LAYERS]
        return {
            f"{plan} {devices}": mean(_peak_of(plan, each, devices) for each in loads)
            for plan in PLANS
            for devices in DEVICES
        }

    def _routed(self, task: str, layer: int) -> Routed:
        mine = self._read(task, layer)
        rng = stream(self.seed, "halves", task, str(layer))
        order = sorted(range(len(mine)), key=[rng.random() for _ in mine].__getitem__)
        half = len(order) // 2
        first, second = (sum((mine[at] for at in part), np.zeros(EXPERTS, dtype=np.int64))
                         for part in (order[:half], order[half:]))  # fmt: skip
        others = np.zeros(EXPERTS, dtype=np.int64)
        for other in TASKS:
            if other != task:
                others += np.sum(self._read(other, layer), axis=0)
        return Routed(first, second, others)

    def _read(self, task: str, layer: int) -> tuple[Counts, ...]:
        return _sequences(self.scale.trace(f"expert_traces/{task}_layer{layer}.txt.gz"))


def _peak_of(plan: str, loads: Routed, devices: int) -> float:
    """Over the mean load of a device, on the tokens that the plan is tested on."""
    now = tuple(tuple(each.tolist()) for each in np.array_split(np.arange(EXPERTS), devices))
    spare = 0 if plan == "lpt" else 1
    known = {"lpt": loads.test, "in-sample": loads.test, "other tasks": loads.others}
    placed = now
    if plan != "contiguous":
        placed = _deal(known.get(plan, loads.plan).tolist(), now, EXPERTS // devices + spare)
    told: Sequence[float] = loads.test.tolist()
    return peak(told, placed) / (sum(told) / devices)


def _deal(loads: Sequence[float], now: Slots, room: int) -> Slots:
    return deal(Experts(loads, now, len(now), room))
