"""Predicted beside measured: one row a figure and load, and the rule by which it passes.

    predicted   the mean over a few simulations, each with its own scatter of steps
    measured    the mean of the repeats
    error       |predicted - measured| / measured
    spread      (greatest - least of the repeats) / measured
    pass        error <= max(5 %, 1.5 * spread)

All repeats count, those with noisy neighbours too: these are marked, and the reader sees how many there were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.report.summary import Figures

LEAST_ALLOWED, SPREADS_ALLOWED = 0.05, 1.5
RULE = (
    f"error <= max({LEAST_ALLOWED:.0%}, {SPREADS_ALLOWED:g} x (most - least of the repeats) / mean)"
)
Read = Callable[[Figures], float | None]


def _spread(name: str, figure: str) -> Read:
    def read(figures: Figures) -> float | None:
        value: float | None = getattr(getattr(figures.all, name), figure)
        return value

    return read


FIGURES: dict[str, Read] = {
    f"{told} {figure}": _spread(name, figure)
    for name, told in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_s", "E2E"))
    for figure in ("mean", "p50", "p99")
}
THROUGHPUT = "output tokens/s"
FIGURES[THROUGHPUT] = lambda figures: figures.all.output_tokens_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure at one load. Seconds, or tokens a second for the throughput; None = nothing was measured."""

    load: float
    figure: str
    simulated: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def predicted(self) -> float | None:
        return sum(self.simulated) / len(self.simulated) if self.simulated else None

    @property
    def mean(self) -> float | None:
        return sum(self.measured) / len(self.measured) if self.measured else None

    @property
    def error(self) -> float | None:
        """Signed: positive where the prediction is too high."""
        if self.predicted is None or not self.mean:
            return None
        return self.predicted / self.mean - 1

    @property
    def spread(self) -> float | None:
        return (max(self.measured) - min(self.measured)) / self.mean if self.mean else None

    @property
    def allowed(self) -> float:
        return max(LEAST_ALLOWED, SPREADS_ALLOWED * (self.spread or 0.0))

    @property
    def has_passed(self) -> bool:
        return self.error is not None and abs(self.error) <= self.allowed

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "load": self.load,
            "figure": self.figure,
            "predicted": self.predicted,
            "simulated": list(self.simulated),
            "measured": list(self.measured),
            "mean": self.mean,
            "error": self.error,
            "spread": self.spread,
            "allowed": self.allowed,
            "has_passed": self.has_passed,
        }


def rows_of(load: float, simulated: Sequence[Figures], measured: Sequence[Figures]) -> list[Row]:
    """All figures at one load."""
    return [
        Row(
            load=load,
            figure=name,
            simulated=_known(read, simulated),
            measured=_known(read, measured),
        )
        for name, read in FIGURES.items()
    ]


def _known(read: Read, figures: Sequence[Figures]) -> tuple[float, ...]:
    return tuple(value for value in map(read, figures) if value is not None)


def table_of(rows: Sequence[Row]) -> list[str]:
    """Lines for people."""
    lines = [
        f"{'load':>5}  {'figure':16} {'measured':>10} {'predicted':>10} {'error':>8} {'spread':>7} {'allowed':>8}"
    ]
    for row in rows:
        error = "-" if row.error is None else f"{row.error:+.1%}"
        spread = "-" if row.spread is None else f"{row.spread:.1%}"
        told = "pass" if row.has_passed else "FAIL"
        lines.append(
            f"{row.load:5.2f}  {row.figure:16} {_told(row, row.mean):>10} {_told(row, row.predicted):>10} "
            f"{error:>8} {spread:>7} {row.allowed:>8.1%}  {told}"
        )
    return lines


def _told(row: Row, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}/s" if row.figure == THROUGHPUT else f"{value * 1e3:.2f} ms"
