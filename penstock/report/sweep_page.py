"""The page of a sweep: what each variant carries, goodput and latency against load, and every point in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from penstock.report.capacity import GOAL, Carried, carried
from penstock.report.charts import LoadPoint, goodput_chart, line
from penstock.report.page import Cell, Chart, Grid, Page, Tile, Words
from penstock.report.sweeps import Line, Show, columns_of, lines_of, words
from penstock.report.table import seconds, share

Row = Mapping[str, object]
MAX_TILES = 6


def sweep_page(rows: Sequence[Row], *, title: str, subtitle: str) -> Page:
    """Everything there is to see of a sweep; at least one row."""
    lines = lines_of(rows)
    models = sorted({str(row["cost_model"]) for row in rows if row.get("cost_model") is not None})
    curves = _curves(lines)
    blocks: list[Chart | Grid | Words] = [
        Words(title="What came out", lines=tuple(words(rows)), is_list=True)
    ]
    if any(len(each) > 1 for each in curves.values()):
        points = {variant: [_load_point(one) for one in each] for variant, each in curves.items()}
        blocks.append(goodput_chart(points))
        for name, figure in (("TTFT", "ttft_p99_s"), ("TPOT", "tpot_p99_s")):
            blocks.append(_latency(name, figure, curves))
    blocks.append(_grid(rows, lines))
    return Page(
        title=title,
        subtitle=subtitle,
        banner="SIMULATED: nothing was run on the hardware named here",
        tiles=_tiles(carried(rows)) if any(len(each) > 1 for each in curves.values()) else (),
        blocks=tuple(blocks),
        notes=tuple(f"Step times come from the {model}." for model in models),
        figures={"rows": [dict(row) for row in rows]},
    )


def _curves(lines: Sequence[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for each in lines:
        if each.get("attainment").mean is not None:
            found.setdefault(each.variant, []).append(each)
    return found


def _load_point(found: Line) -> LoadPoint:
    """Goodput as the share kept of what was offered a second: a run's length has the time in it that its last answers
    take, which would put short runs below the line that their attainment is above of.
    """
    kept, offered = found.get("attainment"), found.offered_per_s
    assert kept.mean is not None and kept.least is not None and kept.most is not None
    ends = (kept.least * offered, kept.most * offered) if kept.is_spread else (None, None)
    return LoadPoint(offered, kept.mean * offered, kept.mean, *ends)


def _latency(name: str, figure: str, curves: Mapping[str, Sequence[Line]]) -> Chart:
    traces = [
        line(
            [each.offered_per_s for each in lines],
            [each.get(figure).mean for each in lines],
            variant,
            place=place,
            more={"mode": "lines+markers", "hovertemplate": "%{y:.3g} s"},
        )
        for place, (variant, lines) in enumerate(curves.items())
    ]
    return Chart(
        title=f"{name}, 99th percentile, against load",
        caption="Seconds on a logarithmic axis, the mean over seeds. Where a curve bends upward, requests queue.",
        data=tuple(traces),
        layout={
            "xaxis": {"title": {"text": "offered, requests/s"}, "rangemode": "tozero"},
            "yaxis": {
                "title": {"text": f"{name} p99, s"},
                "type": "log",
                "tickformat": "~g",
                "dtick": 1 if _is_wide(curves, figure) else "D2",
            },
            "showlegend": len(traces) > 1,
        },
    )


def _is_wide(curves: Mapping[str, Sequence[Line]], figure: str) -> bool:
    """Whether whole decades are enough to read a logarithmic axis by."""
    found = [each.get(figure).mean for lines in curves.values() for each in lines]
    known = [value for value in found if value]
    return bool(known) and max(known) > 100 * min(known)


def _tiles(found: Sequence[Carried]) -> tuple[Tile, ...]:
    loads = [each.mean.load or 0.0 for each in found]
    best = max(loads, default=0.0)
    return tuple(
        Tile(
            label=each.variant,
            value=_carries(each),
            note=f"carried with {GOAL:.0%} of promises kept",
            mood="good" if load and load == best and loads.count(best) == 1 < len(found) else "",
        )
        for each, load in list(zip(found, loads, strict=True))[:MAX_TILES]
    )


def _carries(found: Carried) -> str:
    mean = found.mean
    if mean.low is None:
        return f"< {mean.high:.3g}/s"
    return f"≥ {mean.low:.3g}/s" if mean.high is None else f"{mean.load:.3g}/s"


def _grid(rows: Sequence[Row], lines: Sequence[Line]) -> Grid:
    columns = columns_of(rows)
    kind = lines[0].load_kind
    head = ("variant", *([] if kind is None else [kind]), "offered/s", "seeds")
    names = [_head(name, show) for name, _, show in columns]
    body: list[tuple[Cell, ...]] = []
    for each in lines:
        cells: list[Cell] = [each.variant, *([] if kind is None else [each.load])]
        cells += [each.offered_per_s, len(each.rows)]
        body.append((*cells, *(_cell(each, figure, show) for _, figure, show in columns)))
    return Grid(
        title="Every point",
        caption="Means over seeds; results.parquet has each seed and every other figure.",
        columns=(*head, *names),
        rows=tuple(body),
    )


def _head(name: str, show: Show) -> str:
    unit = ", %" if show is share else ", s" if show is seconds else ""
    return name + unit


def _cell(found: Line, figure: str, show: Show) -> float | None:
    value = found.get(figure).mean
    return value * 100 if value is not None and show is share else value
