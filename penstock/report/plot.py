"""One picture of a run: how TTFT and TPOT are distributed, and how many ran and waited over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.report.files import new_figure, save_figure
from penstock.report.timeline import Bin

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _cdf(axes: Axes, values: Sequence[float], label: str, bound_s: float | None) -> None:
    ordered = sorted(values)
    shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
    axes.step([value * 1e3 for value in ordered], shares, where="post")
    if ordered and ordered[-1] > 20 * max(ordered[0], 1e-6):
        axes.set_xscale("log")
    if bound_s is not None:
        axes.axvline(bound_s * 1e3, linestyle="--", color="grey", label=f"promise {bound_s:g} s")
        axes.legend()
    axes.set_xlabel(f"{label}, ms")
    axes.set_ylabel("share of answers")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)


def _timeline(axes: Axes, bins: Sequence[Bin]) -> None:
    start = bins[0].at if bins else 0.0
    times = [each.at - start for each in bins]
    axes.step(times, [each.running for each in bins], where="post", label="running")
    axes.step(times, [each.waiting for each in bins], where="post", label="waiting")
    axes.set_xlabel("time, s")
    axes.set_ylabel("answers")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)


def plot(
    path: Path | str,
    *,
    ttft_s: Sequence[float],
    tpot_s: Sequence[float],
    bins: Sequence[Bin],
    title: str = "",
    bounds_s: tuple[float | None, float | None] = (None, None),
) -> None:
    """Write a PNG (or what the suffix says). Raises MissingExtra without matplotlib."""
    figure = new_figure(10, 7)
    grid = figure.subplot_mosaic([["ttft", "tpot"], ["time", "time"]])
    _cdf(grid["ttft"], ttft_s, "TTFT", bounds_s[0])
    _cdf(grid["tpot"], tpot_s, "TPOT", bounds_s[1])
    _timeline(grid["time"], bins)
    figure.suptitle(title)
    save_figure(figure, path)
