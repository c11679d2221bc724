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
from dataclasses import dataclass
from typing import Protocol

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
    """The meter of one replica on `tp` cards. Joules are of all its cards, bytes and flops too."""

    def __init__(
        self, shape: ModelShape, card: Card, *, tp: int = 1, coverage: Coverage | None = None
    ) -> None:
        self.card, self.tp = card, tp
        self._shape, self._coverage = shape, coverage
        self.joules = self.busy_s = self.num_bytes = self.flops = 0.0
        self.num_steps = 0
        self._known: dict[tuple[int, int, int | None], tuple[float, float, float, float]] = {}

    @property
    def idle_watts(self) -> float:
        return self.tp * self.card.watts(0.0, 0.0)

    def add(self, features: StepFeatures, steps: int, seconds: float) -> None:
        if features.num_prefills:
            num_bytes, flops = work_of(self._shape, features, self._coverage)
        else:
            num_bytes, flops = self._decode_work(features, steps)
        self.num_bytes += num_bytes
        self.flops += flops
        self.num_steps += steps
        self.busy_s += seconds
        if seconds > 0:
            card, each = self.card, self.tp * seconds
            watts = card.watts(num_bytes / each / card.bandwidth, flops / each / card.flops)
            self.joules += watts * each

    def _decode_work(self, features: StepFeatures, steps: int) -> tuple[float, float]:
        """Bytes and flops of a run of decodes: what does not grow is remembered, the rest is linear in contexts."""
        key = (features.num_tokens, features.num_samples, features.layers)
        known = self._known.get(key)
        if known is None:
            still = features._replace(decode_context=0)
            zero = work_of(self._shape, still, self._coverage)
            one = work_of(self._shape, still._replace(decode_context=1), self._coverage)
            known = self._known[key] = (*zero, one[0] - zero[0], one[1] - zero[1])
        num_bytes, flops, more_bytes, more_flops = known
        context = features.decode_context + features.num_decodes * (steps - 1) / 2  # on average
        return steps * (num_bytes + more_bytes * context), steps * (flops + more_flops * context)


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
    idle_j = sum(one.idle_watts * max(0.0, duration_s - one.busy_s) for one in meters)
    joules = idle_j + sum(one.joules for one in meters)
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
