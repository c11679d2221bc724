"""What lanes that run side by side do to each other: they share the cores of a device, and its one memory.

A lane is launched with a share x of the cores and would take, alone with it, what the step model says. Beside others:

    cores    e_i = x_i / max(1, sum x)             shares that sum to more than 1 are cut in proportion (time slicing)
    memory   v_i = bytes / (seconds(e_i) B)        the part of the device's bandwidth B it would draw, in the mean
             c_i = min(1, e_i / f)                 so few cores cannot draw more
             g_i = max-min fair parts of 1 for the demands min(v_i, c_i)
    speed_i  = seconds(x_i) / t_i * min(1, g_i / v_i) * (1 - friction)       friction only beside others
    t_i      = seconds(e_i), or, where small products keep their efficiency,
               min(seconds(e_i), max(seconds(1), flops / (F e_i)))      F: the rate of a prompt of FULL tokens

so the sum of what lanes draw never exceeds what the memory gives, the small demand is served whole, and cores are
never counted twice. It is a fluid model: a lane draws evenly during its step, lanes do not wait for each other's
kernels, and what they do to each other's caches is in `friction`, if anywhere. B is the bandwidth at the efficiency of
the card's matrix products.

Nothing of this was measured. `fair` takes the constants of the step model, whose products of few rows are as
inefficient on a part of the cores as on all of them, although on all of them it is memory they wait for. `optimistic`
lets them keep their efficiency: a decode step is as fast on few cores until arithmetic is its limit. `pessimistic`
is `fair`, but a lane needs most of the cores for the full bandwidth and both lose a tenth. `none`: each runs as alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.errors import BadConfig
from penstock.cost.hardware import FULL_BANDWIDTH_SHARE
from penstock.cost.step import StepFeatures, StepModel, features_of

FULL = 8192  # tokens of a prompt that uses a device as well as any


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """`full_bandwidth_share` (f): cores that draw all the bandwidth. `is_contended` False: lanes do not meet at all."""

    name: str
    full_bandwidth_share: float = FULL_BANDWIDTH_SHARE
    friction: float = 0.0
    is_contended: bool = True
    keeps_efficiency: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.full_bandwidth_share <= 1 or not 0 <= self.friction < 1:
            raise BadConfig(f"sharing {self.name!r}: full_bandwidth_share or friction out of range")


SHARINGS: dict[str, Sharing] = {
    each.name: each
    for each in (
        Sharing(name="fair"),
        Sharing(name="optimistic", keeps_efficiency=True),
        Sharing(name="pessimistic", full_bandwidth_share=0.7, friction=0.1),
        Sharing(name="none", is_contended=False),
    )
}


def sharing_of(name: str) -> Sharing:
    """Raises BadConfig that names the known ones."""
    if name not in SHARINGS:
        raise BadConfig(f"no sharing of lanes is named {name!r}; known: {', '.join(SHARINGS)}")
    return SHARINGS[name]


def max_min(demands: Sequence[float], supply: float = 1.0) -> list[float]:
    """Fair parts of `supply`: nobody gets more than it wants, and nobody could get more but from one who has less."""
    parts, left = [0.0] * len(demands), supply
    order = sorted(range(len(demands)), key=demands.__getitem__)
    for served, place in enumerate(order):
        parts[place] = min(demands[place], left / (len(order) - served))
        left -= parts[place]
    return parts


class Load:
    """What one lane's step does alone, by the part of the cores it has; worked out once for each part."""

    def __init__(
        self, model: StepModel, parts: Sequence[StepFeatures], share: float, bytes_per_s: float
    ) -> None:
        self.share = share
        self._model, self._parts, self._bytes_per_s = model, parts, bytes_per_s
        self._known: dict[tuple[float, bool], tuple[float, float]] = {}

    def alone(self, cores: float, keeps_efficiency: bool = False) -> tuple[float, float]:
        """(seconds, part of the bandwidth drawn meanwhile) with `cores`."""
        found = self._known.get((cores, keeps_efficiency))
        if found is None:
            steps = [self._model.step(part, cores) for part in self._parts]
            seconds = math.fsum(step.time_s for step in steps)
            if keeps_efficiency and cores < 1:
                whole = math.fsum(self._model.step(part).time_s for part in self._parts)
                flops = math.fsum(step.flops or 0.0 for step in steps)
                seconds = min(seconds, max(whole, flops / (full_rate(self._model) * cores)))
            moved = math.fsum(step.num_bytes or 0.0 for step in steps)
            drawn = moved / (seconds * self._bytes_per_s) if seconds > 0 else 0.0
            found = self._known[cores, keeps_efficiency] = (seconds, min(1.0, drawn))
        return found


def full_rate(model: StepModel) -> float:
    """Flops a second of a prompt of FULL tokens on all cores; infinite for a model that counts none."""
    step = model.step(features_of([(0, FULL, True)]))
    return step.flops / step.time_s if step.flops else math.inf


def speeds(sharing: Sharing, loads: Sequence[Load]) -> list[float]:
    """How fast each lane goes, 1 = as the step model says of its share alone."""
    if not sharing.is_contended:
        return [1.0] * len(loads)
    crowd = max(1.0, sum(load.share for load in loads))
    cores = [load.share / crowd for load in loads]
    keeps = sharing.keeps_efficiency
    alone = [load.alone(mine, keeps) for load, mine in zip(loads, cores, strict=True)]
    drawn = [part for _, part in alone]
    most = [min(1.0, mine / sharing.full_bandwidth_share) for mine in cores]
    given = max_min([min(pair) for pair in zip(drawn, most, strict=True)])
    friction = 1.0 - sharing.friction if len(loads) > 1 else 1.0
    found = []
    for load, mine, (seconds, wanted), got in zip(loads, cores, alone, given, strict=True):
        speed = friction if got >= wanted else friction * got / wanted
        if keeps or mine != load.share:
            speed *= load.alone(load.share)[0] / seconds
        found.append(speed)
    return found
