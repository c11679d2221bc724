"""How much load a variant carries: the highest at which enough requests keep their promise.

Rules
- Loads are taken in rising order up to the first that misses the goal. Between it and the last that held, the capacity
  is where a straight line between their attainments crosses the goal; the two loads bracket it.
- When the lowest load misses the goal, all that is known is that the capacity is below it; when none does, that it is
  at least the highest. Nothing is guessed beyond the loads that were tried.
- A later load that holds again does not count, but is told.
- One variant beats another when its capacity is the higher one for every seed; else the seeds do not agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, object]
_Step = tuple[float, float]  # offered a second, attainment
GOAL = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """`load` interpolated between `low`, the last that held, and `high`, the first that did not; None = not tried."""

    load: float | None
    low: float | None
    high: float | None
    holds_again: bool = False

    def __str__(self) -> str:
        if self.low is None:
            return f"less than {self.high:.4g}/s, the lowest load tried"
        if self.high is None:
            return f"at least {self.low:.4g}/s, the highest load tried"
        return f"{self.load:.3g}/s (between {self.low:.4g} and {self.high:.4g})"


def capacity_of(attained: Mapping[float, float], goal: float = GOAL) -> Capacity:
    """The capacity from the attainment at each load."""
    assert attained, "no load was tried"
    loads = sorted(attained)
    missed = next((i for i, load in enumerate(loads) if attained[load] < goal), None)
    if missed is None:
        return Capacity(load=loads[-1], low=loads[-1], high=None)
    high = loads[missed]
    holds_again = any(attained[load] >= goal for load in loads[missed:])
    if missed == 0:
        return Capacity(load=None, low=None, high=high, holds_again=holds_again)
    low = loads[missed - 1]
    share = (attained[low] - goal) / (attained[low] - attained[high])
    return Capacity(load=low + share * (high - low), low=low, high=high, holds_again=holds_again)


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """One variant: by the mean over seeds, and by each seed."""

    variant: str
    mean: Capacity
    by_seed: Mapping[int, Capacity]

    def __str__(self) -> str:
        told = str(self.mean)
        loads = [each.load for each in self.by_seed.values() if each.load is not None]
        if len(loads) > 1 and max(loads) > min(loads):
            told += f", {min(loads):.3g} to {max(loads):.3g} over {len(loads)} seeds"
        if self.mean.holds_again:
            told += "; a higher load held again"
        return told


def carried(rows: Sequence[Row], figure: str = "attainment", goal: float = GOAL) -> list[Carried]:
    """The capacity of each variant that was run at more than one load, in the order of the rows."""
    table: defaultdict[str, defaultdict[int, dict[object, _Step]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        offered, value, seed = row["offered_per_s"], row.get(figure), row["seed"]
        if row["load_kind"] is not None and isinstance(value, float) and isinstance(offered, float):
            assert isinstance(seed, int)
            table[str(row["variant"])][seed][row["load"]] = (offered, value)
    return [
        Carried(
            variant=variant,
            mean=capacity_of(_mean(by_seed.values()), goal),
            by_seed={
                seed: capacity_of(dict(steps.values()), goal) for seed, steps in by_seed.items()
            },
        )
        for variant, by_seed in table.items()
    ]


def _mean(ladders: Iterable[Mapping[object, _Step]]) -> dict[float, float]:
    """Mean attainment at the mean offered load, of the seeds that have a figure there: points may have failed."""
    steps: defaultdict[object, list[_Step]] = defaultdict(list)
    for ladder in ladders:
        for load, step in ladder.items():
            steps[load].append(step)
    return {
        sum(offered for offered, _ in step) / len(step): sum(value for _, value in step) / len(step)
        for step in steps.values()
    }


def verdict(found: Sequence[Carried]) -> str:
    """Who carries most, in words; empty when there is nothing to compare."""
    if len(found) < 2:
        return ""
    ordered = sorted(found, key=lambda each: each.mean.load or 0.0, reverse=True)
    first, second = ordered[0], ordered[1]
    if first.mean.low is None:
        return "No variant holds the goal at any load tried: sweep lower loads."
    if first.mean.high is None and second.mean.high is None:
        open_ended = [each.variant for each in ordered if each.mean.high is None]
        return f"{_listed(open_ended)} hold the goal at every load tried: sweep higher loads."
    if first.mean.load == second.mean.load:
        same = all(
            first.by_seed[seed] == second.by_seed[seed] for seed in _shared_seeds(first, second)
        )
        told = "" if same else " in the mean, but not with every seed: no clear winner"
        return f"{first.variant} and {second.variant} carry the same{told}."
    told = f"{first.variant} carries the most"
    if first.mean.load and second.mean.load:
        least = "at least " if first.mean.high is None else ""
        told += f": {least}{first.mean.load / second.mean.load:.2f}x of {second.variant}"
    seeds = _shared_seeds(first, second)
    if len(seeds) < 2:
        return f"{told}. One seed: how far chance moves this is not known."
    wins = sum(_beats(first.by_seed[seed], second.by_seed[seed]) for seed in seeds)
    if wins == len(seeds):
        return f"{told}, with every one of {len(seeds)} seeds."
    return f"{told} in the mean, but with {wins} of {len(seeds)} seeds only: no clear winner."


def _shared_seeds(one: Carried, other: Carried) -> set[int]:
    """The seeds of both."""
    return one.by_seed.keys() & other.by_seed.keys()


def _beats(one: Capacity, other: Capacity) -> bool:
    return (one.load or 0.0) > (other.load or 0.0)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
