"""What a run cost: the price of its cards for as long as it took, and its energy where somebody measured that.

Prices are list prices of the card catalogue, dated; a deployment pays for its replicas whether they are busy or not, so
the price of a token is the price of the whole run over all its tokens.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Any

from penstock.core.errors import BadConfig
from penstock.cost.hardware import card_of
from penstock.report.summary import Figures

MILLION = 1e6
HOUR_S = 3600.0
KILOWATT_HOUR_J = 3.6e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Money:
    """`price_h`: dollars an hour of all replicas, None when no known card is named. `energy_j`: of the whole run."""

    price_h: float | None = None
    source: str = ""
    energy_j: float | None = None

    def rows(self, found: Figures) -> list[tuple[str, float, str]]:
        """Name, value, unit and source of what is known."""
        output, prompt = found.all.output_tokens, found.all.prompt_tokens
        told: list[tuple[str, float, str]] = []
        if self.price_h is not None:
            dollars = self.price_h * found.duration_s / HOUR_S
            told.append(("price", self.price_h, f"$ an hour, {self.source}"))
            told.append(("cost of this run", dollars, "$"))
            told += [
                (f"cost per million {name}", dollars / num * MILLION, "$")
                for name, num in _tokens(output, prompt)
                if num
            ]
        if self.energy_j is not None:
            told.append(("energy of this run", self.energy_j / KILOWATT_HOUR_J, "kWh"))
            if found.duration_s > 0:
                told.append(("mean power", self.energy_j / found.duration_s, "W"))
            told += [
                (
                    f"energy per million {name}",
                    self.energy_j / num * MILLION / KILOWATT_HOUR_J,
                    "kWh",
                )
                for name, num in _tokens(output, prompt)
                if num
            ]
        return told

    def per_million_output(self, found: Figures) -> float | None:
        """Dollars."""
        if self.price_h is None or not found.all.output_tokens:
            return None
        return self.price_h * found.duration_s / HOUR_S / found.all.output_tokens * MILLION

    def energy_per_million_output(self, found: Figures) -> float | None:
        """Kilowatt-hours."""
        if self.energy_j is None or not found.all.output_tokens:
            return None
        return self.energy_j / KILOWATT_HOUR_J / found.all.output_tokens * MILLION


def _tokens(output: int, prompt: int) -> tuple[tuple[str, int], ...]:
    return ("output tokens", output), ("tokens, prompt and output", output + prompt)


def price_of(config: str) -> Money:
    """The price of the fleets of a configuration (TOML text, as headers carry it)."""
    try:
        fleets: Any = tomllib.loads(config).get("fleet", [])
    except tomllib.TOMLDecodeError:
        return Money()
    price_h, told = 0.0, []
    for fleet in fleets:
        executor = fleet.get("executor", {})
        try:
            card = card_of(str(executor["gpu"]))
        except (KeyError, BadConfig):  # no card, or one of the user's own catalogue
            return Money()
        num = _devices(fleet, executor.get("tensor_parallel", 1))
        price_h += card.price_h * num
        told.append(f"{num} x {card.name} at ${card.price_h:g}/h as of {card.as_of}")
    return Money(price_h=price_h, source=", ".join(told)) if told else Money()


def _devices(fleet: dict[str, Any], usual: int) -> Any:
    """Of all its replicas, some of which may have a degree of their own."""
    num, degrees = fleet.get("replicas", 1), fleet.get("hand_off", {}).get("degrees", {})
    counts = {role: count for role, count in fleet.get("roles", {}).items() if role in degrees}
    others = num - sum(counts.values())
    return usual * others + sum(degrees[role] * count for role, count in counts.items())
