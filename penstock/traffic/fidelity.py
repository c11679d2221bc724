"""How true a generated workload is to the one it was fitted on: the figures side by side, with bounds.

Bounds: mean rate within 2%, dispersion of counts at 1 s and 60 s within 20%, Kolmogorov-Smirnov distance of prompt and
output lengths at most 0.05. Figures of the generated side are means over the seeds, with the standard deviation between
them. The coefficient of variation of gaps and the quantiles of lengths are told without a bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from penstock.traffic.rows import Row
from penstock.traffic.sample import Sample
from penstock.traffic.statistics import dispersion, gap_cv, ks_distance, quantiles

RATE_BOUND, DISPERSION_BOUND, KS_BOUND = 0.02, 0.20, 0.05
WIDTHS_S = (1.0, 60.0)
SEEDS = (0, 1, 2, 3, 4)


class Generator(Protocol):
    """What makes rows: a fitted model, ServeGen's clients."""

    def rows(self, seed: int) -> Iterator[Row]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line. `error` is relative, or the distance itself; `bound` is None where nothing is required."""

    name: str
    traced: float
    generated: float
    spread: float
    error: float
    bound: float | None = None

    @property
    def is_met(self) -> bool:
        return self.bound is None or self.error <= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """The figures; `str` gives them as a table."""

    num_requests: int
    seeds: tuple[int, ...]
    figures: tuple[Figure, ...]

    @property
    def is_met(self) -> bool:
        return all(figure.is_met for figure in self.figures)

    def table(self) -> list[dict[str, object]]:
        """For JSON."""
        return [{**asdict(figure), "is_met": figure.is_met} for figure in self.figures]

    def __str__(self) -> str:
        head = f"{'':24}{'traced':>11}{'generated':>11}{'spread':>9}{'error':>9}{'bound':>8}"
        lines = [f"{self.num_requests} requests, {len(self.seeds)} seeds", head]
        for figure in self.figures:
            bound = "" if figure.bound is None else f"{figure.bound:8.3f}"
            verdict = "" if figure.bound is None else "  met" if figure.is_met else "  MISSED"
            lines.append(
                f"{figure.name:24}{figure.traced:11.4g}{figure.generated:11.4g}{figure.spread:9.2g}"
                f"{figure.error:9.4f}{bound}{verdict}"
            )
        return "\n".join(lines)


def _compared(
    name: str, traced: float, drawn: Sequence[float], bound: float | None = None
) -> Figure:
    mean = float(np.mean(drawn))
    if math.isnan(traced):  # too short a trace to tell
        bound = None
    error = abs(mean - traced) / abs(traced) if traced else math.inf
    return Figure(
        name=name,
        traced=traced,
        generated=mean,
        spread=float(np.std(drawn)),
        error=error,
        bound=bound,
    )


def _distance(name: str, traced: Sample, drawn: Sequence[Sample], side: int) -> Figure:
    found = [ks_distance(traced.pairs[:, side], each.pairs[:, side]) for each in drawn]
    return Figure(
        name=name,
        traced=0.0,
        generated=float(np.mean(found)),
        spread=float(np.std(found)),
        error=float(np.mean(found)),
        bound=KS_BOUND,
    )


def compare(traced: Sample, drawn: Sequence[Sample], seeds: Sequence[int] = ()) -> Fidelity:
    """The figures of a trace beside those of samples drawn over the same span."""

    def each(name: str, of: Callable[[Sample], float], bound: float | None = None) -> Figure:
        return _compared(name, of(traced), [of(sample) for sample in drawn], bound)

    figures = [each("rate (1/s)", lambda sample: sample.mean_rate_per_s, RATE_BOUND)]
    for width in WIDTHS_S:
        figures.append(
            each(
                f"dispersion at {width:g} s",
                lambda sample, width=width: dispersion(sample.at_s, width, end_s=sample.end_s),  # type: ignore[misc]
                DISPERSION_BOUND,
            )
        )
    figures.append(each("CV of gaps", lambda sample: gap_cv(sample.at_s)))
    for side, name in enumerate(("prompt", "output")):
        figures.append(_distance(f"KS of {name} lengths", traced, drawn, side))
        for at, value in quantiles(traced.pairs[:, side]).items():
            found = [quantiles(sample.pairs[:, side], (at,))[at] for sample in drawn]
            figures.append(_compared(f"{name} p{at * 100:g}", value, found))
    return Fidelity(num_requests=len(traced), seeds=tuple(seeds), figures=tuple(figures))


def fidelity(traced: Sample, model: Generator, seeds: Iterable[int] = SEEDS) -> Fidelity:
    """Draw from a model with every seed over the span of the trace, and compare."""
    seeds = tuple(seeds)
    drawn = [Sample.of_rows(model.rows(seed), end_s=traced.end_s) for seed in seeds]
    return compare(traced, drawn, seeds)
