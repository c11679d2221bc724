"""What goes where before we start? Asked by `penstock plan placement`, once, with a judge that can try a placement.

A unit is what gets repeated: an instance that does both phases, or a pair of which one prefills and one decodes, or one
phase alone. A judge says whether a unit keeps its promises at a rate; policies only choose what to ask it.

Law: the devices of a deployment are there; every instance divides the model's heads and layers and holds its weights
beside something to remember; where links between nodes are slow, a pair's stage shares a node, and so does tensor
parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

Way = Literal["disaggregated", "colocated", "chunked", "prefill", "decode"]


@dataclass(frozen=True, slots=True, order=True)
class Parallel:
    """One instance: tp devices side by side in each of pp stages."""

    tp: int = 1
    pp: int = 1

    @property
    def devices(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"tp {self.tp}" + (f" pp {self.pp}" if self.pp > 1 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """`decode`: of pairs only. `cross`: segments of pipelines, each on a node of its own, `parallel` and `decode` being
    those of one segment. `chunk`: tokens of a step of both phases.
    """

    way: Way
    parallel: Parallel
    decode: Parallel | None = None
    cross: int = 1
    chunk: int | None = None

    def __post_init__(self) -> None:
        assert (self.decode is not None) == (self.way == "disaggregated"), self
        assert (self.chunk is not None) == (self.way == "chunked"), self

    @property
    def segment(self) -> int:
        """Devices that share a node."""
        return self.parallel.devices + (0 if self.decode is None else self.decode.devices)

    @property
    def devices(self) -> int:
        return self.cross * self.segment

    def instances(self) -> tuple[Parallel, ...]:
        """Whole ones, over all segments."""
        parts = (self.parallel,) if self.decode is None else (self.parallel, self.decode)
        return tuple(Parallel(part.tp, self.cross * part.pp) for part in parts)

    def __str__(self) -> str:
        told = [str(part) for part in self.instances()]
        if self.decode is not None:
            return f"prefill {told[0]} + decode {told[1]}"
        named = f"chunked {self.chunk}" if self.way == "chunked" else self.way
        return f"{named} {told[0]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """`has_fast_links`: KV moves between nodes as inside of one."""

    nodes: int = 1
    devices_per_node: int = 8
    has_fast_links: bool = False

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """`device_bytes`: of one device that weights and KV may take. `degrees`: of tensor parallelism, as far as steps are
    known; None = any.
    """

    name: str
    heads: int
    layers: int
    weight_bytes: float
    kv_bytes: float  # of a position
    device_bytes: float
    degrees: tuple[int, ...] | None = None

    def kv_tokens(self, instance: Parallel) -> int:
        """Positions that fit beside the weights; fewer than 1 where these do not."""
        left = instance.devices * self.device_bytes - self.weight_bytes
        return max(0, math.floor(left / self.kv_bytes))

    def can_be(self, instance: Parallel) -> bool:
        return (
            self.heads % instance.tp == 0
            and self.layers % instance.pp == 0
            and (self.degrees is None or instance.tp in self.degrees)
            and self.kv_tokens(instance) > 0
        )

    def instances(self, most: int) -> Iterator[Parallel]:
        """All valid ones of at most so many devices."""
        for tp in range(1, most + 1):
            for pp in range(1, most // tp + 1):
                if self.can_be(Parallel(tp, pp)):
                    yield Parallel(tp, pp)


@dataclass(frozen=True, slots=True)
class View:
    """`attains(unit, rate_per_s)`: whether one unit keeps its promises. `most`: requests a second and device beyond
    which nobody looks. `demand_per_s` None: one unit, or the best mix of them.
    """

    site: Site
    model: Model
    attains: Callable[[Unit, float], bool]
    most: float
    demand_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Tried:
    """The highest rate of one unit, requests a second; 0 where not even the slowest asked for was kept."""

    unit: Unit
    rate_per_s: float

    @property
    def per_device(self) -> float:
        return self.rate_per_s / self.unit.devices


@dataclass(frozen=True, slots=True)
class Deployment:
    """Units and how many of each; `rate_per_s`: what they serve together within their promises."""

    groups: tuple[tuple[Unit, int], ...]
    rate_per_s: float

    @property
    def devices(self) -> int:
        return sum(unit.devices * count for unit, count in self.groups)

    @property
    def per_device(self) -> float:
        """Goodput."""
        return self.rate_per_s / self.devices

    def __str__(self) -> str:
        return " + ".join(f"{count} x ({unit})" for unit, count in self.groups)


@dataclass(frozen=True, slots=True)
class Decision:
    """`deployment` None: nothing keeps the promises. `tried` in the order of asking."""

    deployment: Deployment | None
    tried: tuple[Tried, ...]
    why: str = ""


def law(view: View, decision: Decision) -> None:
    if decision.deployment is None:
        return
    assert decision.deployment.groups, "a deployment of nothing"
    assert decision.deployment.devices <= view.site.devices, "there are not so many devices"
    for unit, count in decision.deployment.groups:
        assert count > 0, f"{count} of {unit}"
        for instance in unit.instances():
            assert view.model.can_be(instance), f"{view.model.name} cannot be {instance}"
        if not view.site.has_fast_links:
            assert unit.segment <= view.site.devices_per_node, f"{unit} is cut by a slow link"


def highest(
    attains: Callable[[float], bool], most: float, tolerance: float, devices: int = 1
) -> float:
    """The highest rate a device in (0, most] that is kept, to within `tolerance` below it; 0 for none."""
    low, high = 0.0, most
    while high - low > tolerance:
        middle = (low + high) / 2
        if attains(middle * devices):
            low = middle
        else:
            high = middle
    return low


def try_out(view: View, unit: Unit, tolerance: float) -> Tried:
    """Ask the judge for the highest rate of this unit."""
    rate = highest(
        lambda rate_per_s: view.attains(unit, rate_per_s), view.most, tolerance, unit.devices
    )
    return Tried(unit, rate * unit.devices)


def best_of(tried: list[Tried]) -> Tried | None:
    """The highest rate a device; of equals, that with the fewest devices."""
    kept = [each for each in tried if each.rate_per_s > 0]
    return max(kept, key=lambda each: (each.per_device, -each.unit.devices), default=None)


def replicas(view: View, found: Tried) -> Deployment:
    """As many as the demand asks for and the site holds."""
    wanted = (
        1 if view.demand_per_s is None else max(1, math.ceil(view.demand_per_s / found.rate_per_s))
    )
    count = min(wanted, view.site.devices // found.unit.devices)
    return Deployment(((found.unit, count),), count * found.rate_per_s)


class Policy(Protocol):
    def decide(self, view: View) -> Decision: ...
