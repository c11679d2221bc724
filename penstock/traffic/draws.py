"""Numbers drawn from small distributions: how many turns, how long a thought, how large a document.

In a workload file each is a number (always that one) or a table with a `kind`:

    turns = 4
    think_s = {kind = "lognormal", mean = 45.0, cv = 1.2}
    calls = {kind = "geometric", mean = 3.5, most = 20}

None is ever negative. `cv` is the standard deviation over the mean. exponential, lognormal and geometric take `least`
and `most`: what is drawn beyond is moved there, which shifts the mean a little. Counts are rounded to whole numbers by
whoever asks (`whole`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from penstock.core.config import Table, build
from penstock.core.errors import BadConfig

Drawn = float | Table  # how a distribution is written in a file


class Draw(Protocol):
    def draw(self, chance: random.Random) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounded:
    """What the kinds below have in common: where draws are cut."""

    least: float = 0.0
    most: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ValueError(
                f"least must be from 0 up and most not below it, got {self.least} and {self.most}"
            )

    def within(self, value: float) -> float:
        return min(max(value, self.least), self.most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < math.inf:
            raise ValueError(f"it must not be negative nor infinite, got {self.value}")

    def draw(self, chance: random.Random) -> float:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high < math.inf:
            raise ValueError(
                f"low must not be negative and high not below low, got {self.low} and {self.high}"
            )

    def draw(self, chance: random.Random) -> float:
        return chance.uniform(self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponential(Bounded):
    mean: float

    def __post_init__(self) -> None:
        super(Exponential, self).__post_init__()
        if not self.mean > 0:
            raise ValueError(f"the mean must be positive, got {self.mean}")

    def draw(self, chance: random.Random) -> float:
        return self.within(chance.expovariate(1 / self.mean))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lognormal(Bounded):
    mean: float
    cv: float

    def __post_init__(self) -> None:
        super(Lognormal, self).__post_init__()
        if not (self.mean > 0 and self.cv > 0):
            raise ValueError(f"mean and cv must be positive, got {self.mean} and {self.cv}")

    def draw(self, chance: random.Random) -> float:
        variance = math.log1p(self.cv**2)
        mu = math.log(self.mean) - variance / 2
        return self.within(chance.lognormvariate(mu, math.sqrt(variance)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometric(Bounded):
    """Whole numbers from 1: after each, one more follows with the same probability."""

    mean: float

    def __post_init__(self) -> None:
        super(Geometric, self).__post_init__()
        if not self.mean >= 1:
            raise ValueError(f"a geometric count has a mean of at least 1, got {self.mean}")

    def draw(self, chance: random.Random) -> float:
        if self.mean == 1:
            return self.within(1.0)
        ends = math.log1p(-1 / self.mean)
        return self.within(1.0 + math.floor(math.log(1.0 - chance.random()) / ends))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of `values`, with chances in proportion to `weights` (equal ones unless told)."""

    values: tuple[float, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a choice needs values")
        if not all(0 <= value < math.inf for value in self.values):
            raise ValueError(f"values must not be negative nor infinite, got {list(self.values)}")
        if self.weights and len(self.weights) != len(self.values):
            raise ValueError(f"{len(self.values)} values need as many weights")
        if self.weights and (min(self.weights) < 0 or not sum(self.weights) > 0):
            raise ValueError("weights must not be negative, and their sum must be positive")

    def draw(self, chance: random.Random) -> float:
        return chance.choices(self.values, self.weights or None)[0]


KINDS: dict[str, type[Draw]] = {
    "fixed": Fixed,
    "uniform": Uniform,
    "exponential": Exponential,
    "lognormal": Lognormal,
    "geometric": Geometric,
    "choice": Choice,
}


def draw_of(written: Drawn, where: str) -> Draw:
    """The distribution as written at `where`. Raises BadConfig."""
    if isinstance(written, Mapping):
        table = dict(written)
        kind = table.pop("kind", None)
        if not isinstance(kind, str) or kind not in KINDS:
            raise BadConfig(f"{where}.kind must be one of {', '.join(KINDS)}; got {kind!r}")
        return build(KINDS[kind], table, where)
    return build(Fixed, {"value": float(written)}, where)


def whole(draw: Draw, chance: random.Random, least: int = 1) -> int:
    """A draw rounded to a count of at least `least`."""
    return max(least, round(draw.draw(chance)))


def zipf_weights(number: int, exponent: float) -> list[float]:
    """Cumulative weights of the popularity ranks 1..number, the k-th in proportion to 1/k^exponent."""
    weights, total = [], 0.0
    for rank in range(1, number + 1):
        total += rank**-exponent
        weights.append(total)
    return weights
