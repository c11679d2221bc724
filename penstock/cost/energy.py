"""Energy: what the devices of a replica draw while steps run, and while they do not.

    watts of one device = p0 + pm * MBU + pf * MFU, at most its TDP       MBU, MFU: shares of its peaks

p0, pm and pf are fitted on published measurements of whole servers (hardware.toml says which); for a card without a
fit they are H100's by TDP, and `power_source` says so. A linear law may be applied to a whole launch at once, to its
bytes and flops summed. Between launches a device draws p0, which is where the fit begins and not a measured idle.

At a share f of the full clock arithmetic peaks at f times the flops; memory keeps its bandwidth. Its power falls
faster than its speed: pm * f^1.3 and pf * f^2. The exponents are assumptions within what is published (1.3 for steps of
decodes, 1.6 to 2.5 for prefills), not fits.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from penstock.cost.coverage import Coverage
from penstock.cost.hardware import Card
from penstock.cost.shapes import ModelShape
from penstock.cost.step import StepFeatures
from penstock.cost.work import work_of

MEMORY_EXPONENT = 1.3
FLOPS_EXPONENT = 2.0
MILLION = 1e6
HOUR_S = 3600.0


class Meter(Protocol):
    """Hears of every completed launch."""

    def add(self, features: StepFeatures, steps: int, seconds: float) -> None:
        """`steps` identical steps in a row that took `seconds` in all; `features` are the first one's."""
        ...


class EnergyMeter:
    """The meter of one replica on `tp` cards. Joules are of all its cards, bytes and flops too.

    A step's bytes and flops (`work_of`) are linear in all but its tokens: what those decide is worked out once for each
    number of them, and a launch costs a few multiplications.
    """

    def __init__(
        self, shape: ModelShape, card: Card, *, tp: int = 1, coverage: Coverage | None = None
    ) -> None:
        self.card, self.tp = card, tp
        self._shape, self._coverage = shape, coverage
        self.joules = self.busy_s = self.num_bytes = self.flops = 0.0
        self.num_steps = 0
        self._still: dict[tuple[int, int | None], tuple[float, float]] = {}  # by tokens, layers
        self._each: dict[int | None, _Each] = {}  # by layers
        idle, per_bandwidth, per_flops = card.power_law
        self._byte_j, self._flop_j = per_bandwidth / card.bandwidth, per_flops / card.flops
        self._least_watts, self._most_watts = tp * idle, tp * card.tdp_w

    @property
    def idle_watts(self) -> float:
        return self.tp * self.card.watts(0.0, 0.0)

    def add(self, features: StepFeatures, steps: int, seconds: float) -> None:
        num_tokens, _, samples, decodes, context, _, _, pairs, prefill_context, layers = features
        still = self._still.get((num_tokens, layers))
        if still is None:
            features = StepFeatures(num_tokens, 0, 0, layers=layers)
            still = work_of(self._shape, features, self._coverage)
            self._still[num_tokens, layers] = still
        each = self._each.get(layers) or self._learn(layers)
        decoded = context + decodes * (steps - 1) / 2  # positions, on average
        num_bytes = steps * (still[0] + each.position_bytes * (decoded + prefill_context))
        flops = still[1] + each.sample_flops * samples + each.pair_flops * (decoded + pairs)
        flops *= steps
        if samples:
            num_bytes += steps * each.head_bytes
        self.num_bytes += num_bytes
        self.flops += flops
        self.num_steps += steps
        self.busy_s += seconds
        joules = self._least_watts * seconds + self._byte_j * num_bytes + self._flop_j * flops
        most = self._most_watts * seconds
        self.joules += joules if joules < most else most

    def _learn(self, layers: int | None) -> _Each:
        still = StepFeatures(1, 0, 0, layers=layers)

        def work(**more: int) -> tuple[float, float]:
            return work_of(self._shape, still._replace(**more), self._coverage)

        num_bytes, flops = work()
        head_bytes, sample_flops = work(num_samples=1)
        position_bytes, _ = work(prefill_context=1)
        _, pair_flops = work(prefill_pairs=1)
        each = self._each[layers] = _Each(
            head_bytes - num_bytes,
            sample_flops - flops,
            position_bytes - num_bytes,
            pair_flops - flops,
        )
        return each


class _Each(NamedTuple):
    """What a step's samples and contexts add to its work. The head is read once, however many it samples for."""

    head_bytes: float
    sample_flops: float
    position_bytes: float
    pair_flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetEnergy:
    """Of one fleet over a run. None = not known: no card is named, no token came, or no time went by.

    `joules` holds `idle_j`, what was drawn while no step ran. `dollars` is rent, paid for busy and idle time alike.
    """

    fleet: str
    joules: float | None = None
    idle_j: float | None = None
    mean_watts: float | None = None
    joules_per_million_output: float | None = None
    dollars: float | None = None
    dollars_per_million_output: float | None = None
    power_source: str | None = None


def energy_of(
    fleet: str,
    meters: list[EnergyMeter],
    *,
    duration_s: float,
    output_tokens: int,
    price_h: float | None,
) -> FleetEnergy:
    """What the replicas of a fleet drew and cost in `duration_s`; `price_h` is of all of them."""
    millions = output_tokens / MILLION
    dollars = None if price_h is None else price_h * duration_s / HOUR_S
    found = FleetEnergy(
        fleet=fleet,
        dollars=dollars,
        dollars_per_million_output=dollars / millions if dollars is not None and millions else None,
    )
    if not meters:
        return found
    idle_j = math.fsum(one.idle_watts * max(0.0, duration_s - one.busy_s) for one in meters)
    joules = idle_j + math.fsum(one.joules for one in meters)
    card = meters[0].card
    return dataclasses.replace(
        found,
        joules=joules,
        idle_j=idle_j,
        mean_watts=joules / duration_s if duration_s > 0 else None,
        joules_per_million_output=joules / millions if millions else None,
        power_source=f"fit of {card.name}" if card.power else f"h100's fit by TDP of {card.name}",
    )


def at_clock(card: Card, share: float) -> Card:
    """The card locked to `share` of its full clock."""
    if share == 1.0:
        return card
    idle, memory, flops = card.power_law
    return dataclasses.replace(
        card,
        tflops=card.tflops * share,
        fp8_tflops=None if card.fp8_tflops is None else card.fp8_tflops * share,
        power=(idle, memory * share**MEMORY_EXPONENT, flops * share**FLOPS_EXPONENT),
    )
