"""A picture of a validation: each figure over the load, measured with its repeats' range, predicted beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from penstock.lab.validate import Validated
from penstock.lab.verdict import FIGURES, THROUGHPUT, Row
from penstock.report.files import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURED, PREDICTED = "#0072b2", "#d55e00"  # told apart by the colour-blind too


def plot(path: Path | str, found: Validated) -> None:
    """Write a PNG (or what the suffix says). Raises MissingExtra without matplotlib."""
    names = list(FIGURES)
    figure = new_figure(15, 6.5)
    for axes, name in zip(figure.subplots(2, -(-len(names) // 2)).flat, names, strict=False):
        _panel(axes, name, [row for row in found.rows if row.figure == name])
    figure.axes[0].legend(frameon=False)
    marked = sum(run.is_marked for run in found.runs)
    figure.suptitle(
        f"{found.profile.model}: predicted and measured, {found.wanted.repeats} repeats of "
        f"{found.slice.num_requests} requests; {found.num_passed} of {len(found.rows)} figures pass; "
        f"{marked} of {len(found.runs)} runs had busy neighbours"
    )
    save_figure(figure, path)


def _panel(axes: Axes, name: str, rows: list[Row]) -> None:
    scale, unit = (1.0, "tokens/s") if name == THROUGHPUT else (1e3, "ms")
    known = [row for row in rows if row.mean is not None and row.predicted is not None]
    loads = [row.load for row in known]
    means = [scale * (row.mean or 0.0) for row in known]
    below = [mean - scale * min(row.measured) for mean, row in zip(means, known, strict=True)]
    above = [scale * max(row.measured) - mean for mean, row in zip(means, known, strict=True)]
    axes.errorbar(
        loads,
        means,
        yerr=[below, above],
        fmt="o",
        capsize=5,
        color=MEASURED,
        label="measured, range",
    )
    predicted = [scale * (row.predicted or 0.0) for row in known]
    axes.plot(loads, predicted, "D--", mfc="none", color=PREDICTED, label="predicted")
    axes.set_title(name)
    axes.set_xlabel("share of the saturation rate")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
