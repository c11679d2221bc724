"""The card catalogue: what accelerators can do, read from a dated data file that users may replace or extend.

Efficiencies are functions of size, because kernels reach their peak on large matrices only: `curve` interpolates the
measured points linearly and holds the ends. A lane that gets a share x of the device computes at x times the peak,
but reaches the full memory bandwidth already at FULL_BANDWIDTH_SHARE of the cores; this is a stated constant of the
model, not a measurement.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.core.config import build, load_toml
from penstock.core.errors import BadConfig
from penstock.core.schema import check_schema
from penstock.cost.shapes import ModelShape

CATALOGUE = Path(__file__).with_name("hardware.toml")
FULL_BANDWIDTH_SHARE = 0.4
RESERVE_BYTES = 1.5e9  # activations, graphs and the runtime; stated, not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One accelerator; see the head of hardware.toml for units and meanings. Absent links and power are None."""

    name: str
    tflops: float
    memory_mib: int
    tb_s: float
    tdp_w: float
    price_h: float
    as_of: str
    source: str
    measured: bool
    gemm_mbu: float
    gemm_mfu: tuple[tuple[float, ...], ...]
    decode_attention_mbu: float
    attention_floor_s: float
    prefill_attention_mfu: tuple[tuple[float, ...], ...]
    fp8_tflops: float | None = None
    link_gb_s: float | None = None
    pcie_gb_s: float | None = None
    all_reduce: tuple[tuple[float, ...], ...] = ()
    power: tuple[float, ...] | None = None
    skew: float = 0.0  # added share of the time between the longest and the mean decode context

    @property
    def flops(self) -> float:
        return self.tflops * 1e12

    @property
    def bandwidth(self) -> float:
        return self.tb_s * 1e12

    @property
    def memory_bytes(self) -> float:
        return self.memory_mib * 2.0**20

    @property
    def power_law(self) -> tuple[float, float, float]:
        """(idle, per unit of bandwidth use, per unit of flops use) watts. Without a fit, H100's scaled by TDP."""
        if self.power is not None:
            idle, per_bandwidth, per_flops = self.power
            return idle, per_bandwidth, per_flops
        part = self.tdp_w / 700
        return 27 * part, 628 * part, 657 * part

    def watts(self, bandwidth_use: float, flops_use: float) -> float:
        """Power at these shares of the peaks, at most TDP."""
        idle, per_bandwidth, per_flops = self.power_law
        return min(self.tdp_w, idle + per_bandwidth * bandwidth_use + per_flops * flops_use)

    def all_reduce_s(self, num_bytes: float, devices: int) -> float:
        """Seconds for one sum over `devices`. Raises BadConfig where no link of that size was measured."""
        if devices == 1:
            return 0.0
        for size, alpha_s, gb_s in self.all_reduce:
            if size == devices:
                return alpha_s + 2 * (devices - 1) / devices * num_bytes / (gb_s * 1e9)
        known = ", ".join(str(int(row[0])) for row in self.all_reduce) or "none"
        raise BadConfig(
            f"no all-reduce among {devices} {self.name} was measured (known: {known})",
            hint="add a row to all_reduce in your hardware file",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    schema: int
    card: tuple[Card, ...]


@functools.cache
def read_catalogue(path: Path = CATALOGUE) -> dict[str, Card]:
    table = load_toml(path)
    schema = table.get("schema")
    check_schema(str(path), schema if isinstance(schema, int) else 0)
    return {card.name: card for card in build(Catalogue, table).card}


def card_of(name: str, path: Path | None = None) -> Card:
    """A card by name, from the user's file when one is given and names it, else from the catalogue."""
    known = dict(read_catalogue())
    if path is not None:
        known.update(read_catalogue(path))
    if name not in known:
        raise BadConfig(f"no hardware is named {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def curve(points: Sequence[Sequence[float]], at: float) -> float:
    """Linear interpolation through (x, y) points in rising x; the ends are held."""
    index = bisect_right(points, at, key=lambda point: point[0])
    if index == 0:
        return points[0][1]
    if index == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def num_blocks(
    card: Card, shape: ModelShape, *, tp: int = 1, fraction: float = 0.9, block_size: int = 16
) -> int:
    """KV blocks that fit beside the weights when `fraction` of the memory of `tp` cards may be used."""
    free = tp * (card.memory_bytes * fraction - RESERVE_BYTES) - shape.weight_bytes
    blocks = int(free // (shape.kv_bytes * block_size))
    if blocks < 1:
        raise BadConfig(
            f"{shape.name} ({shape.weight_bytes / 1e9:.1f} GB of weights) leaves no room for KV blocks on "
            f"{tp} x {card.name} ({card.memory_bytes * fraction / 1e9:.1f} GB usable each)",
            hint="use more devices, a larger card or a smaller model",
        )
    return blocks
