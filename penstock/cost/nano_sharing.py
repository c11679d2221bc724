"""What kernels of two kinds get when they share a device: the product keeps 1 - s of its speed, the other gets P(s).

Shares are counted in the product's own speed, since a device has no knob for its bandwidth or its links: a kernel "has
the share s" when the product beside it runs at 1 - s of what it does alone; it then runs at P(s) of what it does alone.
Kernels of the three kinds together are taken to share as in pairs: products at 1 - s - s', each other at its own P.

    time-slicing     P(s) = s            side by side is as good as one after the other
    paper            P(s) > s            what NanoFlow's own search reads, for its kernels on A100s
    none             P(0) = 1            no interference: the bound of what overlap could give

A kernel is launched with its share (its number of thread blocks), so it keeps P(s) also while nothing runs beside it.

The values of `paper` are those of two files of the authors' repository (efeslab/Nanoflow, commit d1bbe277, autosearch/
trace/gemv_interference.csv and net_interference.csv), in steps of 0.1: decode attention up to a share of 0.9, networks
up to 0.5. The straight lines between, and beyond 0.5 for networks, are ours. As in their search (search-70.ipynb) a
product with the part 1 - s of the device takes 1 / (1 - s) as long. The files are rounded to 0.05 and say neither how
nor on which shapes they were measured; Table 3 of the publication, which is measured too, was not at hand.
`pessimistic` gives half of their gain over time-slicing.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.errors import BadConfig
from penstock.cost.hardware import curve
from penstock.cost.nano_layer import Resource

Points = tuple[tuple[float, float], ...]
TENTHS = tuple(tenth / 10 for tenth in range(1, 11))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """(share, speed) of memory- and of network-bound kernels beside products. `levels`: shares that may be given."""

    name: str
    memory: Points
    network: Points
    levels: tuple[float, ...] = TENTHS

    def __post_init__(self) -> None:
        for points in (self.memory, self.network):
            rises = all(
                a[0] < b[0] and a[1] <= b[1] for a, b in zip(points, points[1:], strict=False)
            )
            if not points or not rises or points[-1][1] > 1:
                raise BadConfig(f"sharing {self.name!r}: speeds rise with shares, up to 1")
        for resource in ("memory", "network"):
            if not self.levels or min(self.speed(resource, each) for each in self.levels) <= 0:
                raise BadConfig(f"sharing {self.name!r}: every level needs a speed above 0")

    def speed(self, resource: Resource, share: float) -> float:
        """Of a kernel with this share, relative to itself alone; of products, the share itself."""
        if resource == "compute":
            return share
        return curve(self.memory if resource == "memory" else self.network, share)


def halfway(points: Points) -> Points:
    """Half of the gain over time-slicing."""
    return tuple((share, (share + speed) / 2) for share, speed in points)


def tenths(*speeds: float) -> Points:
    """The speeds at shares of 0.1, 0.2 and so on; nothing at 0, and all at 1."""
    return ((0, 0), *zip(TENTHS, speeds, strict=False), (1, 1))


_MEMORY = tenths(0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
_NETWORK = tenths(0.4, 0.6, 0.7, 0.8, 0.9)
_EQUAL: Points = ((0, 0), (1, 1))
_FREE: Points = ((0, 1), (1, 1))

SHARINGS: dict[str, Sharing] = {
    each.name: each
    for each in (
        Sharing(name="none", memory=_FREE, network=_FREE, levels=(0.0,)),
        Sharing(name="paper", memory=_MEMORY, network=_NETWORK),
        Sharing(
            name="pessimistic",
            memory=halfway(_MEMORY),
            network=halfway(_NETWORK),
        ),
        Sharing(name="time-slicing", memory=_EQUAL, network=_EQUAL),
    )
}


def sharing_of(name: str) -> Sharing:
    """Raises BadConfig that names the known ones."""
    if name not in SHARINGS:
        raise BadConfig(f"no sharing is named {name!r}; known: {', '.join(SHARINGS)}")
    return SHARINGS[name]
