"""The page: one file that asks nobody for anything, charts that plotly accepts, the same numbers everywhere."""

from __future__ import annotations

import json
import random
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.core.errors import BadConfig, BadTrace, MissingExtra
from penstock.core.events import Event, Header
from penstock.core.types import Slo
from penstock.lab.report import report_of, runs_of
from penstock.report import console, table
from penstock.report.charts import LoadPoint, cdf, goodput_chart
from penstock.report.collect import BANDS, Collector
from penstock.report.html import render, write
from penstock.report.log import LogWriter
from penstock.report.metrics import Metrics
from penstock.report.page import Chart, Grid, Page, Tile, Words, number
from penstock.report.runs import Run
from penstock.report.series import MAX_BINS, MAX_REPLICAS, Series
from penstock.report.summary import Figures
from tests.report.events import arrived, born, completed, finished, header, played, stepped

pytest.importorskip("plotly", reason="the extra lab is not installed")

ASKS = [(0.02 * i, 20 + i, 5 + i) for i in range(40)]
VOID = {"meta", "link", "br", "circle", "path"}


class Reader(HTMLParser):
    """Checks that tags are balanced and gathers what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.stack.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] not in ("script", "style"):
            self.texts.append(data)


def write_log(events: list[Event], path: Path) -> Path:
    log = LogWriter(path)
    for event in events:
        log.emit(event)
    log.close()
    return path


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("logs")
    found = []
    for name, speed in (("slow", 1.0), ("quick", 4.0)):
        events = played([(at / speed, *rest) for at, *rest in ASKS], num_blocks=60, max_jobs=6)  # type: ignore[arg-type, misc]
        found.append(write_log(events, folder / f"{name}.jsonl"))
    return found


@pytest.fixture(scope="module")
def page(logs: list[Path]) -> Page:
    return report_of(runs_of(logs[:1]), asked=["r7"])


def test_the_page_is_one_file_that_fetches_nothing(page: Page) -> None:
    reader = Reader()
    reader.feed(render(page))
    assert not reader.stack
    assert reader.fetched == ["data:,"]
    told = " ".join(reader.texts)
    assert page.title in told and all(tile.value in told for tile in page.tiles)
    assert all(block.title in told for block in page.blocks)


def test_what_a_user_chose_is_text_and_not_markup() -> None:
    evil = "</script><script>alert(1)</script>"
    chart = Chart(
        title=evil, caption=evil, data=({"type": "scatter", "x": [1], "y": [1], "name": evil},)
    )
    grid = Grid(title=evil, columns=(evil, "n"), rows=((evil, 1.5),))
    page = Page(title=evil, banner=evil, tiles=(Tile(label=evil, value=evil),), notes=(evil,),
                blocks=(chart, grid, Words(title=evil, lines=(evil,))))  # fmt: skip
    reader = Reader()
    text = render(page)
    reader.feed(text)
    assert "<script>alert" not in text and evil in " ".join(reader.texts)


def test_the_terminal_takes_no_markup_either() -> None:
    """A tenant may be called [/x]."""
    name = "[/x] [bold]y"
    grid = Grid(title=name, columns=(name, "n"), rows=((name, 1.5),))
    page = Page(title=name, banner=name, tiles=(Tile(label=name, value=name, note=name),), notes=(name,),
                blocks=(grid, Words(title=name, lines=(name,))))  # fmt: skip
    assert console.render(page).count(name) == 11
    group = Metrics().read([arrived(0.0, 0)]).figures().all
    figures = Figures(duration_s=1.0, all=group, tenants={name: group, "z": group})
    assert name in table.render(figures)


def test_plotly_accepts_every_chart(page: Page, logs: list[Path]) -> None:
    graph_objects = pytest.importorskip(
        "plotly.graph_objects", reason="the extra lab is not installed"
    )
    both = report_of(runs_of(logs))
    tenants = Collector("t").read(of_two_tenants()).facts()
    from penstock.report.compose import compose
    from penstock.report.words import Context

    charts = [
        block
        for each in (page, both, compose([tenants], Context()))
        for block in each.blocks
        if isinstance(block, Chart)
    ]
    titles = {chart.title for chart in charts}
    assert titles == {
        "Goodput against load", "How long answers took", "Inside the replicas over time", "Where the time went",
        "The slowest answers", "Who kept their promise",
    }  # fmt: skip
    for chart in charts:
        graph_objects.Figure(data=list(chart.data), layout=chart.layout)
        for trace in chart.data:
            assert len(trace["x"]) == len(trace["y"]) <= 2000  # type: ignore[arg-type]


def of_two_tenants() -> list[Event]:
    """Tenant a keeps its promise, tenant b does not."""
    log: list[Event] = [header(), born()]
    for seq, (tenant, took) in enumerate((("a", 0.5), ("b", 2.0))):
        at = 3.0 * seq
        start = arrived(at, seq, tenant=tenant, slo=Slo(ttft_s=1.0))
        log += [
            start, stepped(at, seq, [(seq, 100)], admitted=(seq,)), completed(seq, [at + took], [seq]),
            finished(at + took, start, num_output=1, first_at=at + took),
        ]  # fmt: skip
    return log


def test_worst_and_count_stand_side_by_side() -> None:
    from penstock.report.compose import compose
    from penstock.report.words import Context

    told = compose([Collector("x").read(of_two_tenants()).facts()], Context())
    tiles = {tile.label: tile for tile in told.tiles}
    assert (
        tiles["kept their promise"].value == "50.0%" and tiles["kept their promise"].mood == "bad"
    )
    assert (
        tiles["worst class or tenant"].value == "0.0%"
        and tiles["worst class or tenant"].note == "tenant b"
    )


def test_json_terminal_and_browser_say_the_same(page: Page, logs: list[Path]) -> None:
    told: Any = json.loads(json.dumps(page.to_dict(), allow_nan=False))
    figures = told["figures"]["slow"]["figures"]["all"]
    assert figures["num_finished"] == len(ASKS)
    text = console.render(page)
    (grid,) = [block for block in page.blocks if block.title == "Latencies, s"]
    assert isinstance(grid, Grid) and grid.rows[0][2] == figures["ttft_s"]["p50"]
    assert number(figures["ttft_s"]["p50"]) in text and number(figures["ttft_s"]["p50"]) in render(
        page
    )
    assert "Why did r7 take" in text
    lives = console.render(page.lives())
    assert "Why did r7 take" in lives and "Latencies" not in lives
    assert [asked["request"] for asked in told["figures"]["slow"]["asked"]] == ["r7"]
    parts = told["figures"]["slow"]["asked"][0]["parts"]
    assert sum(parts.values()) == pytest.approx(
        told["figures"]["slow"]["asked"][0]["e2e_s"], abs=1e-9
    )


def test_bands_hold_every_answer_once_and_their_means_are_of_all(logs: list[Path]) -> None:
    facts = Collector().read(Run(logs[0])).facts()
    assert sum(band.num for band in facts.bands) == len(ASKS) and len(facts.bands) <= len(BANDS)
    total = sum(band.num * sum(band.parts.values()) for band in facts.bands)
    mean = facts.figures.all.e2e_s.mean
    assert mean is not None and total == pytest.approx(mean * len(ASKS), rel=1e-9)


def test_a_simulated_run_says_so_and_a_measured_one_does_not(page: Page, tmp_path: Path) -> None:
    assert page.banner.startswith("SIMULATED")
    log: list[Event] = [header(), *played(ASKS[:2])[1:]]
    log[0] = Header(version="0.1.0", who="replica-0", wall_at=1.0)
    assert report_of(runs_of([write_log(log, tmp_path / "a.jsonl")])).banner == ""


def test_what_is_not_known_is_left_out_and_named(page: Page) -> None:
    notes = " ".join(page.notes)
    assert "Cost is left out" in notes and "Energy is left out" in notes
    assert not any("million" in tile.label for tile in page.tiles)


def test_a_request_that_never_arrived_is_an_error(logs: list[Path]) -> None:
    with pytest.raises(BadTrace, match="no request 'nobody'"):
        report_of(runs_of(logs), asked=["nobody"])


def test_a_file_that_cannot_be_written_is_an_error(page: Page, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match="cannot write the report"):
        write(page, tmp_path / "file" / "report.html")


def test_a_chart_without_plotly_names_the_extra(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtra, match="plotly"):
        render(page)


def test_a_cdf_of_few_points_lies_on_that_of_all() -> None:
    rng = random.Random(1)
    values = [rng.lognormvariate(0, 1) for _ in range(20_000)]
    x, y = cdf(values)
    assert len(x) <= 401 and x == sorted(x) and (x[0], x[-1]) == (min(values), max(values))
    whole = np.searchsorted(np.sort(values), x, side="right") / len(values)
    assert list(whole) == pytest.approx(y, abs=1e-12)
    assert cdf([]) == ([], []) and cdf([2.0]) == ([2.0], [1.0])


def test_goodput_is_drawn_by_load_with_the_line_of_the_goal() -> None:
    points = [LoadPoint(4.0, 2.0, 0.5, 1.5, 2.5), LoadPoint(2.0, 2.0, 1.0, 2.0, 2.0)]
    chart = goodput_chart({"a": points})
    by_name = {trace["name"]: trace for trace in chart.data}
    assert by_name["90% of it"]["y"] == [0.0, 3.6] and by_name["a"]["x"] == [2.0, 4.0]
    assert by_name["a"]["error_y"]["arrayminus"] == [0.0, 0.5]  # type: ignore[index]


# ---------------------------------------------------------------- what stands behind the charts


def test_series_stay_small_and_keep_their_peaks() -> None:
    series = Series(width_s=0.001)
    series.open("a", 100)
    for i in range(50_000):
        series.add(
            stepped(
                0.01 * i,
                i,
                [],
                who="a",
                num_running=i % 7,
                num_waiting=900 if i == 31_234 else 0,
                free_blocks=75,
            )
        )
    (curve,) = series.curves()
    assert len(curve.at_s) == len(curve.running) <= MAX_BINS
    assert max(curve.waiting) == 900 and max(curve.running) == 6
    assert curve.memory is not None and set(curve.memory) == {0.25}
    peak = curve.at_s[curve.waiting.index(900)]
    assert abs(peak - 312.34) <= series.width_s


def test_an_idle_replica_holds_nothing() -> None:
    events = played([(0.0, 8, 4), (30.0, 8, 4)])
    (curve,) = Collector().read(events).facts().curves
    middle = len(curve.at_s) // 2
    assert curve.running[middle] == 0 and max(curve.running) == 1
    assert curve.memory is not None and curve.memory[middle] == 0.0


def test_many_replicas_are_told_by_rank() -> None:
    series = Series(width_s=1.0)
    for i in range(MAX_REPLICAS + 3):
        series.add(stepped(0.0, 0, [], who=f"replica-{i}", num_running=i))
    least, median, most = series.curves()
    assert (least.running, median.running, most.running) == ([0], [5], [10])


def test_logs_of_one_deployment_are_told_in_one_order_by_the_wall_clock(tmp_path: Path) -> None:
    """The second process's loop began 100 s before the first's header and shows 500 at that instant."""
    asked, one = arrived(1.0, 0, who="fleet"), arrived(501.25, 0)
    write_log(
        [Header(version="0.1.0", who="fleet", wall_at=1_700_000_000.0), asked], tmp_path / "a.jsonl"
    )
    mine: list[Event] = [
        header(loop_at=500.0), one, stepped(501.5, 0, [(0, 100)], admitted=(0,)), completed(0, [502.0], [0]),
        finished(502.0, one, num_output=1, first_at=502.0),
    ]  # fmt: skip
    write_log(mine, tmp_path / "b.jsonl")
    run = Run(tmp_path)
    told = [(event.kind, event.at) for event in run if event.kind != "header"]  # type: ignore[union-attr]
    assert told == [
        ("arrived", 1.0),
        ("arrived", 1.25),
        ("stepped", 1.5),
        ("completed", 2.0),
        ("finished", 2.0),
    ]
    assert "wall clocks" in run.notes()[0]
    figures = Collector().read(run).facts().figures
    assert figures.all.ttft_s.p50 == pytest.approx(0.75)
