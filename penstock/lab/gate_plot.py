"""A picture of the gate: every request of every run, simulated over real, and the line on which they are equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.lab.gate import Gated
from penstock.lab.gate_scores import FIGURES
from penstock.report.files import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTS, LINE = "#0072b2", "#777777"


def plot(path: Path, found: Sequence[Gated]) -> None:
    """Write a PNG (or what the suffix says). Raises MissingExtra without matplotlib."""
    figure = new_figure(12, 3.8 * len(found))
    panels = figure.subplots(len(found), len(FIGURES), squeeze=False)
    for row, one in zip(panels, found, strict=True):
        for axes, name in zip(row, FIGURES, strict=True):
            _panel(axes, name, one)
        row[0].set_title(one.log.name, loc="left")
    save_figure(figure, path)


def _panel(axes: Axes, name: str, one: Gated) -> None:
    scale, unit = (1e3, "ms") if name == "tpot" else (1.0, "s")
    real = [scale * getattr(each, f"{name}_s") for each in one.real]
    simulated = [scale * getattr(each, f"{name}_s") for each in one.simulated]
    most = max(*real, *simulated)
    axes.plot([0, most], [0, most], color=LINE, linewidth=1)
    axes.scatter(real, simulated, s=6, color=DOTS, alpha=0.6)
    axes.set_xlabel(f"real {name.upper()}, {unit}")
    axes.set_ylabel(f"simulated {name.upper()}, {unit}")
    mape = one.scores.errors[f"{name}_mape"]
    axes.text(0.04, 0.94, f"MAPE {mape:.1f} %", transform=axes.transAxes, va="top")
    axes.grid(alpha=0.3)
