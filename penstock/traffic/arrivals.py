"""Arrival processes: when requests come. Each is a frozen table, `{kind = "poisson", rate_per_s = 4}`.

Theory. What a serving system feels is not the mean rate but how counts vary: the index of dispersion of counts
(variance over mean in bins of one width) is 1 for Poisson at every width, and 20 at 60 s in Azure's conversations.

| kind | gaps or counts | dispersion |
|---|---|---|
| replay | the instants given | as traced |
| poisson | exponential gaps | 1 |
| gamma, weibull | gaps of one law, by rate and cv | tends to cv^2 as bins grow |
| renewal | a Gamma or Weibull law per window | windows' spread + cv^2 within |
| negative_binomial | counts per bin | the one asked for, at the bin and all multiples of it |
| on_off | Poisson at two rates, exponential stays (MMPP-2) | closed form, see OnOff |
| diurnal | any process, its clock run by a cosine | that process's + the day's |
| windows | one process after the other | mixed |
| scaled | any process, played `speed` times as fast | at bins `speed` times as short: unchanged |

Rules: `instants(seed)` is endless unless the process ends (replay, renewal, windows); see `process` for the rest. Every
process knows its `mean_rate_per_s`, so that two can be compared at equal load (`at_rate`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from penstock.core.config import build
from penstock.core.errors import BadConfig
from penstock.traffic.modulated import Diurnal, Scaled, Window, Windows, at_rate
from penstock.traffic.process import (
    BLOCK,
    Arrivals,
    Drawn,
    Floats,
    blocks_of,
    check_positive,
    generator,
    mean_rate_of,
)
from penstock.traffic.renewal import Counts, Law, endless, in_window, shape_of_cv


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay(Drawn):
    """The instants given, exactly (no rounding, no chance)."""

    kind: ClassVar[str] = "replay"
    at_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if any(after < before for before, after in zip(self.at_s, self.at_s[1:], strict=False)):
            raise ValueError("instants to replay must not fall")

    def blocks(self, seed: int) -> Iterator[Floats]:
        yield np.array(self.at_s)

    def instants(self, seed: int) -> Iterator[float]:
        return iter(self.at_s)

    @property
    def mean_rate_per_s(self) -> float:
        span_s = self.at_s[-1] - self.at_s[0] if self.at_s else 0.0
        return (len(self.at_s) - 1) / span_s if span_s > 0 else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson(Drawn):
    """Independent arrivals."""

    kind: ClassVar[str] = "poisson"
    rate_per_s: float

    def __post_init__(self) -> None:
        check_positive(rate_per_s=self.rate_per_s)

    def blocks(self, seed: int) -> Iterator[Floats]:
        return endless(generator(seed, self.kind), Law(rate_per_s=self.rate_per_s))

    @property
    def mean_rate_per_s(self) -> float:
        return self.rate_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamma(Drawn):
    """Gamma gaps: cv > 1 is bursty, 1 is Poisson, below 1 is smooth."""

    kind: ClassVar[str] = "gamma"
    rate_per_s: float
    cv: float = 2.0

    def __post_init__(self) -> None:
        check_positive(rate_per_s=self.rate_per_s, cv=self.cv)

    def blocks(self, seed: int) -> Iterator[Floats]:
        return endless(generator(seed, self.kind), Law.of_cv("gamma", self.rate_per_s, self.cv))

    @property
    def mean_rate_per_s(self) -> float:
        return self.rate_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Weibull(Drawn):
    """Weibull gaps: at equal cv a heavier tail than Gamma and fewer gaps near zero."""

    kind: ClassVar[str] = "weibull"
    rate_per_s: float
    cv: float = 2.0

    def __post_init__(self) -> None:
        check_positive(rate_per_s=self.rate_per_s, cv=self.cv)
        shape_of_cv("weibull", self.cv)

    def blocks(self, seed: int) -> Iterator[Floats]:
        return endless(generator(seed, self.kind), Law.of_cv("weibull", self.rate_per_s, self.cv))

    @property
    def mean_rate_per_s(self) -> float:
        return self.rate_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal(Drawn):
    """A law per window of `window_s`. After its last window it ends, begins again (`is_repeated`), or goes on with the
    law `rest` for ever."""

    kind: ClassVar[str] = "renewal"
    window_s: float
    laws: tuple[Law, ...]
    counts: Counts = "renewal"
    is_repeated: bool = False
    rest: Law | None = None

    def __post_init__(self) -> None:
        check_positive(window_s=self.window_s)
        if not any(law.rate_per_s for law in (*self.laws, *self.tail())):
            raise ValueError("a renewal process needs a window with a rate")
        if self.is_repeated and self.rest is not None:
            raise ValueError("a renewal process either begins again or goes on with `rest`")

    def tail(self) -> tuple[Law, ...]:
        """The windows that are repeated after the last."""
        if self.rest is not None:
            return (self.rest,)
        return self.laws if self.is_repeated else ()

    def blocks(self, seed: int) -> Iterator[Floats]:
        rng, laws, start = generator(seed, self.kind), self.laws, 0
        while laws:
            for number, law in enumerate(laws, start):
                yield number * self.window_s + in_window(rng, law, self.window_s, self.counts)
            start, laws = start + len(laws), self.tail()

    @property
    def mean_rate_per_s(self) -> float:
        laws = self.tail() or self.laws
        return math.fsum(law.rate_per_s for law in laws) / len(laws)

    def times(self, factor: float) -> Renewal:
        """The same windows with `factor` times the arrivals: gaps are shortened, windows are not."""
        laws = tuple(replace(law, rate_per_s=law.rate_per_s * factor) for law in self.laws)
        rest = self.rest and replace(self.rest, rate_per_s=self.rest.rate_per_s * factor)
        return replace(self, laws=laws, rest=rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class NegativeBinomial(Drawn):
    """Counts per bin of mean m and variance `dispersion` x m (index of dispersion 1 + m/r), uniform within a bin."""

    kind: ClassVar[str] = "negative_binomial"
    rate_per_s: float
    dispersion: float
    bin_s: float = 1.0

    def __post_init__(self) -> None:
        check_positive(rate_per_s=self.rate_per_s, bin_s=self.bin_s)
        if not self.dispersion > 1:
            raise ValueError(f"a negative binomial has dispersion above 1, got {self.dispersion}")

    def blocks(self, seed: int) -> Iterator[Floats]:
        rng = generator(seed, self.kind)
        mean = self.rate_per_s * self.bin_s
        num_bins = max(1, min(BLOCK, int(BLOCK / mean)))
        start = 0
        while True:
            counts = rng.negative_binomial(
                mean / (self.dispersion - 1), 1 / self.dispersion, num_bins
            )
            bins = np.repeat(np.arange(start, start + num_bins), counts)
            yield np.sort(bins + rng.random(len(bins))) * self.bin_s
            start += num_bins

    @property
    def mean_rate_per_s(self) -> float:
        return self.rate_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class OnOff(Drawn):
    """Poisson at `on_rate_per_s` and `off_rate_per_s` in turns; stays are exponential. Starts in equilibrium.

    With leaving rates a (on) and b (off), s = a + b: dispersion at width t is
    1 + 2 (on-off)^2 a b / (s^2 (on b + off a)) x (1 - (1 - exp(-s t)) / (s t)).
    """

    kind: ClassVar[str] = "on_off"
    on_rate_per_s: float
    off_rate_per_s: float = 0.0
    mean_on_s: float
    mean_off_s: float

    def __post_init__(self) -> None:
        check_positive(
            on_rate_per_s=self.on_rate_per_s, mean_on_s=self.mean_on_s, mean_off_s=self.mean_off_s
        )
        if not self.off_rate_per_s >= 0:
            raise ValueError(f"off_rate_per_s must be zero or more, got {self.off_rate_per_s}")

    def blocks(self, seed: int) -> Iterator[Floats]:
        rng = generator(seed, self.kind)
        is_on, at = bool(rng.random() < self.mean_on_s / (self.mean_on_s + self.mean_off_s)), 0.0
        while True:
            stay_s = rng.exponential(self.mean_on_s if is_on else self.mean_off_s)
            rate = self.on_rate_per_s if is_on else self.off_rate_per_s
            yield at + np.sort(rng.random(rng.poisson(rate * stay_s))) * stay_s
            is_on, at = not is_on, at + stay_s

    @property
    def mean_rate_per_s(self) -> float:
        num = self.on_rate_per_s * self.mean_on_s + self.off_rate_per_s * self.mean_off_s
        return num / (self.mean_on_s + self.mean_off_s)

    def dispersion_at(self, width_s: float) -> float:
        """The index of dispersion of counts, closed form."""
        leave, come = 1 / self.mean_on_s, 1 / self.mean_off_s
        total = leave + come
        gap = self.on_rate_per_s - self.off_rate_per_s
        mean = self.on_rate_per_s * come + self.off_rate_per_s * leave
        limit = 2 * gap**2 * leave * come / (total**2 * mean)
        return 1 + limit * (1 + math.expm1(-total * width_s) / (total * width_s))


KINDS: dict[str, type[Drawn]] = {
    each.kind: each
    for each in (
        Replay,
        Poisson,
        Gamma,
        Weibull,
        Renewal,
        NegativeBinomial,
        OnOff,
        Diurnal,
        Windows,
        Scaled,
    )
}


def arrivals_of(table: Mapping[str, object], where: str = "arrivals") -> Arrivals:
    """Read `{kind = "gamma", rate_per_s = 4, cv = 2}`. Raises BadConfig naming the key at fault."""
    rest = {key: value for key, value in table.items() if key != "kind"}
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise BadConfig(f"{where}.kind is {kind!r}", hint=f"write one of {known}")
    if isinstance(inner := rest.get("inner"), Mapping):
        rest["inner"] = arrivals_of(inner, f"{where}.inner")
    if kind == "windows" and isinstance(windows := rest.get("windows"), list | tuple):
        rest["windows"] = [_window(each, f"{where}.windows[{i}]") for i, each in enumerate(windows)]
    return build(KINDS[kind], rest, where)


def _window(value: object, where: str) -> object:
    if isinstance(value, Mapping) and isinstance(inner := value.get("arrivals"), Mapping):
        return {**value, "arrivals": arrivals_of(inner, f"{where}.arrivals")}
    return value


def table_of_arrivals(arrivals: object) -> dict[str, object]:
    """The table that `arrivals_of` reads back to an equal object."""
    assert dataclasses.is_dataclass(arrivals)
    kind = getattr(arrivals, "kind", None)
    named = {} if kind is None else {"kind": kind}
    values = {f.name: getattr(arrivals, f.name) for f in dataclasses.fields(arrivals)}
    return {**named, **{key: _plain(each) for key, each in values.items() if each is not None}}


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return table_of_arrivals(value)
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


__all__ = [
    "KINDS",
    "Arrivals",
    "Diurnal",
    "Drawn",
    "Gamma",
    "Law",
    "NegativeBinomial",
    "OnOff",
    "Poisson",
    "Renewal",
    "Replay",
    "Scaled",
    "Weibull",
    "Window",
    "Windows",
    "arrivals_of",
    "at_rate",
    "blocks_of",
    "mean_rate_of",
    "table_of_arrivals",
]
