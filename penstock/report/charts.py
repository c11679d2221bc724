"""The charts of a report, as plotly figures in plain dictionaries. Colours are tones, painted by the page.

Every curve has at most MAX_POINTS points. A CDF keeps its ends and is even in probability, with the upper percentiles
denser, where promises are kept or broken; series over time arrive thinned (see `report.series`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from penstock.report.page import Chart

MAX_POINTS = 2000
CDF_POINTS = 400
NUM_TONES = 8
DASHES = ("solid", "dot", "dash", "dashdot")
GOAL = 0.9  # the share of requests that must keep their promise for a load to count as carried
Rows = Sequence[float | None]


def tone_of(place: int) -> str:
    """The tone of the place-th of several curves."""
    return str(place % NUM_TONES + 1)


def line(
    x: Sequence[float],
    y: Rows,
    name: str,
    *,
    place: int = 0,
    axis: str = "",
    more: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """A curve. `axis`: the number of its x and y axes, "" for the first."""
    trace: dict[str, object] = {
        "type": "scatter",
        "mode": "lines",
        "x": [_short(value) for value in x],
        "y": [None if value is None else _short(value) for value in y],
        "name": name,
        "legendgroup": name,
        "meta": {"tone": tone_of(place)},
        "line": {"width": 2, "dash": DASHES[place // NUM_TONES % len(DASHES)]},
    }
    if axis:
        trace |= {"xaxis": f"x{axis}", "yaxis": f"y{axis}"}
    return trace | dict(more or {})


def _short(value: float) -> float:
    """Six digits: more than a screen shows, and half the bytes."""
    return float(f"{value:.6g}")


def cdf(values: Sequence[float], num: int = CDF_POINTS) -> tuple[list[float], list[float]]:
    """Values and the share of all that do not exceed them: at most `num` points, exact at each."""
    ordered = sorted(values)
    size = len(ordered)
    if not size:
        return [], []
    half = num // 2
    shares = [i / half for i in range(half)] + [1 - 10 ** (-4 * i / half) for i in range(half)]
    ranks = sorted({min(size, max(1, math.ceil(share * size))) for share in shares} | {1, size})
    return [ordered[rank - 1] for rank in ranks], [rank / size for rank in ranks]


# ---------------------------------------------------------------- goodput against load


class LoadPoint(NamedTuple):
    """One run at one load. `least` and `most` are the goodputs of the worst and best seed, None for one run."""

    offered_per_s: float
    goodput_per_s: float
    attainment: float
    least: float | None = None
    most: float | None = None


def goodput_chart(curves: Mapping[str, Sequence[LoadPoint]], goal: float = GOAL) -> Chart:
    """Goodput against load for each variant, beside what was offered and the line below which a load is not carried."""
    top = max((point.offered_per_s for points in curves.values() for point in points), default=1.0)
    traces: list[dict[str, object]] = [
        _ray(top, 1.0, "all that is offered", "dot"),
        _ray(top, goal, f"{goal:.0%} of it", "dash"),
    ]
    for place, (name, points) in enumerate(curves.items()):
        ordered = sorted(points)
        more: dict[str, object] = {
            "mode": "lines+markers",
            "marker": {"size": 7},
            "customdata": [[round(point.attainment, 4)] for point in ordered],
            "hovertemplate": "%{y:.3g}/s (%{customdata[0]:.1%} kept)",
        }
        if any(point.least is not None for point in ordered):
            more["error_y"] = {
                "type": "data",
                "array": [(point.most or point.goodput_per_s) - point.goodput_per_s for point in ordered],
                "arrayminus": [
                    point.goodput_per_s - (point.goodput_per_s if point.least is None else point.least)
                    for point in ordered
                ],
                "thickness": 1.2,
                "width": 4,
            }  # fmt: skip
        x = [point.offered_per_s for point in ordered]
        traces.append(
            line(x, [point.goodput_per_s for point in ordered], name, place=place, more=more)
        )
    return Chart(
        title="Goodput against load",
        caption=f"A load is carried where the curve stays above the {goal:.0%} line: at least that share of the "
        "offered requests kept all their promises. Whiskers: the worst and the best seed.",
        data=tuple(traces),
        layout={
            "xaxis": {"title": {"text": "offered, requests/s"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "kept their promise, requests/s"}, "rangemode": "tozero"},
        },
        height=400,
        is_wide=True,
    )


def _ray(top: float, slope: float, name: str, dash: str) -> dict[str, object]:
    more = {"meta": {"tone": "muted"}, "line": {"width": 1.5, "dash": dash}, "hoverinfo": "skip"}
    return line([0.0, top], [0.0, slope * top], name, more=more)


# ---------------------------------------------------------------- latencies


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """One figure of each run, as its CDF, and the promise about it if all were given the same."""

    name: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    bound_s: float | None = None


def latency_chart(latencies: Sequence[Latency]) -> Chart:
    """CDFs side by side, seconds on a logarithmic axis; promises as dashed lines."""
    panels = [_panel(i, len(latencies), latency) for i, latency in enumerate(latencies)]
    layout: dict[str, object] = {
        "hovermode": "closest",
        "margin": {"l": 54, "r": 16, "t": 30, "b": 44},
        "shapes": [_bound(i, each.bound_s) for i, each in enumerate(latencies) if each.bound_s],
        "annotations": [
            _promise(i, each.bound_s) for i, each in enumerate(latencies) if each.bound_s
        ],
    }
    for _, axes in panels:
        layout |= axes
    return Chart(
        title="How long answers took",
        caption="Each curve is the share of answers that took no longer than the time below it: the further left, the "
        "faster; read a percentile at its height on the left. TTFT: time to first token. TPOT: mean gap between later "
        "tokens. E2E: arrival to last token.",
        data=tuple(trace for traces, _ in panels for trace in traces),
        layout=layout,
        height=360,
        is_wide=True,
    )


def _axis(place: int) -> str:
    return "" if place == 0 else str(place + 1)


def _panel(
    place: int, num: int, latency: Latency
) -> tuple[list[dict[str, object]], dict[str, object]]:
    """The curves and the two axes of one latency among `num`."""
    axis, is_first = _axis(place), place == 0
    traces = []
    for each, (name, (x, y)) in enumerate(latency.curves.items()):
        more = {
            "line": {"width": 2, "shape": "hv", "dash": DASHES[each // NUM_TONES % len(DASHES)]},
            "showlegend": is_first and len(latency.curves) > 1,
            "hovertemplate": "%{y:.1%} within %{x:.3g} s",
        }
        traces.append(line(x, y, name, place=each, axis=axis, more=more))
    axes: dict[str, object] = {
        f"xaxis{axis}": {
            "type": "log",
            "domain": [place / num + (0.0 if is_first else 0.02), (place + 1) / num - 0.01],
            "title": {"text": f"{latency.name}, s"},
            "anchor": f"y{axis}",
            "dtick": "D2" if _is_narrow(latency) else 1,
            "tickformat": "~g",
        },
        f"yaxis{axis}": {
            "range": [0, 1.01],
            "tickformat": ".0%",
            "anchor": f"x{axis}",
            "showticklabels": is_first,
            "tickvals": [0, 0.25, 0.5, 0.75, 0.9, 1],
        },
    }
    return traces, axes


def _bound(place: int, bound_s: float) -> dict[str, object]:
    x, y = f"x{_axis(place)}", f"y{_axis(place)}"
    ends = {"x0": bound_s, "x1": bound_s, "y0": 0, "y1": 1}
    return {"type": "line", "xref": x, "yref": y, "name": "ink", **ends}


def _promise(place: int, bound_s: float) -> dict[str, object]:
    return {
        "xref": f"x{_axis(place)}",
        "yref": f"y{_axis(place)}",
        "x": math.log10(bound_s),
        "y": 0.06,
        "text": f"promise {bound_s:g} s",
        "showarrow": False,
        "xanchor": "right",
        "xshift": -5,
    }


def _is_narrow(latency: Latency) -> bool:
    """Whether a logarithmic axis would have too few whole decades to be read."""
    values = [x[at] for x, _ in latency.curves.values() if x for at in (0, -1) if x[at] > 0]
    return bool(values) and max(values) < 30 * min(values)
