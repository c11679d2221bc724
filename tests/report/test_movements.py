"""Movements in reports and traces: a fleet in virtual time whose requests move, and a log written by hand."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from penstock.core.events import Event, Finished
from penstock.core.moving import Departed, Migrated
from penstock.core.steered import Scaled, Steered
from penstock.report.collect import Collector
from penstock.report.compose import compose
from penstock.report.movements import OTHER, REASONS, Movements
from penstock.report.page import Grid, Words
from penstock.report.perfetto import TraceWriter
from penstock.report.phases import Phases, Walk
from penstock.report.words import Context
from tests.cluster.test_movement import script
from tests.report.events import header

MOVED = {"who": "fleet", "request": "r1", "source": "a", "target": "b", "mode": "live"}


def migrated(at: float, **more: Any) -> Migrated:
    return Migrated(at=at, **{**MOVED, "outcome": "committed", "pause_s": 0.004, **more})


@pytest.fixture(scope="module")
def events() -> list[Event]:
    found = list(script(0, 60, kills=False).log.events)
    assert sum(isinstance(each, Migrated) and each.outcome == "committed" for each in found) > 5
    return found


def test_what_moved_and_why_is_counted() -> None:
    told = Movements()
    wanted = (("r1", "a", "b", "live"),)
    told.on_steered(
        Steered(
            at=1.0,
            who="fleet",
            cause="tick",
            about="",
            moving=(),
            moves=wanted,
            why="a is full",
            denied=(("r9", "a", "b", "live", "cooldown"),),
        )  # fmt: skip
    )
    told.on_migrated(migrated(1.1, num_blocks=7, num_bytes=700, stages=2))
    told.on_migrated(migrated(2.0, outcome="refused", why="it has ended", pause_s=None))
    told.on_scaled(
        Scaled(at=3.0, who="fleet", starting=(), add=(("any", 2),), drain=("a",), why="busy")
    )
    found = told.to_dict()
    assert found["moved"] == [
        {
            "mode": "live", "outcome": "committed", "num": 1, "num_blocks": 7, "num_bytes": 700,
            "pause_p50_s": pytest.approx(0.004, rel=0.006), "pause_p99_s": pytest.approx(0.004, rel=0.006),
        },
        {
            "mode": "live", "outcome": "refused", "num": 1, "num_blocks": 0, "num_bytes": 0, "pause_p50_s": None,
            "pause_p99_s": None,
        },
    ]  # fmt: skip
    assert found["reasons"] == [["committed", "a is full", 1], ["refused", "it has ended", 1]]
    assert found["denied"] == {"cooldown": 1}
    assert found["scaled"] == [["add 2 (any)", "busy", 1], ["put out a", "busy", 1]]
    assert told.words("r1") == (
        "from a to b (live, 7 blocks in 2 stages), standing still for 4 ms: a is full",
        "not from a to b (live): refused: it has ended",
    )
    told.forget("r1")
    assert told.words("r1") == ()


def test_reasons_without_end_are_counted_together() -> None:
    told = Movements()
    for number in range(2 * REASONS):
        told.on_migrated(migrated(1.0, outcome="refused", why=f"reason {number}"))
    assert len(told.reasons) == REASONS + 1 and told.reasons["refused", OTHER] == REASONS


def test_a_report_has_tables_of_them_and_tells_the_life_of_one(events: list[Event]) -> None:
    moved = next(
        each.request
        for each in events
        if isinstance(each, Migrated) and each.outcome == "committed"
    )
    collector = Collector("run", asked=[moved]).read([header(), *events])
    page = compose([collector.facts()], Context())
    titles = [block.title for block in page.blocks]
    assert "Movements between replicas" in titles
    table = next(
        block
        for block in page.blocks
        if isinstance(block, Grid) and block.title == "Movements between replicas"
    )
    counted = sum(row[2] for row in table.rows)  # type: ignore[misc]
    assert counted == sum(isinstance(each, Migrated) for each in events)
    (life,) = [block for block in page.blocks if isinstance(block, Words) and block.about == moved]
    assert any(line.startswith("Moved from ") for line in life.lines), life.lines


def walks_of(events: list[Event]) -> list[Walk]:
    walks: list[Walk] = []
    phases = Phases(lambda walk: None, walks.append)
    for event in events:
        phases.emit(event)
    phases.close(events[-1].at)  # type: ignore[union-attr]
    assert not (phases._settled or phases._targets)
    return walks


def test_every_part_says_where_the_answer_goes_on(events: list[Event]) -> None:
    walks = walks_of(events)
    moved = [each for each in walks if each.left == "moved"]
    assert len(moved) == sum(
        isinstance(each, Migrated) and each.outcome == "committed" for each in events
    )
    departed = sum(isinstance(each, Departed) for each in events)
    assert departed == sum(each.left is not None for each in walks) > 0
    by_place = {(each.who, each.event.request): each for each in walks if each.left != "dropped"}
    for each in moved:
        assert each.moved_to is not None
        assert (each.moved_to, each.event.request) in by_place
    came = [each for each in walks if each.moved_from is not None]
    assert len(came) == len(moved)
    ended = {each.request for each in events if isinstance(each, Finished)}
    assert (
        not {each.event.request for each in walks if each.finished is None and not each.left}
        & ended
    )


def test_a_trace_calls_it_moved(events: list[Event]) -> None:
    file = io.StringIO()
    writer = TraceWriter(file)
    for event in [header(), *events]:
        writer.emit(event)
    writer.close()
    told = json.loads(file.getvalue())["traceEvents"]
    ends = [each["args"] for each in told if each["ph"] == "e" and "reason" in each.get("args", {})]
    moved = [each for each in ends if each["reason"] == "moved"]
    assert moved and all("goes on at" in each for each in moved)
    assert not any(each["reason"] == "unfinished" for each in ends)
    assert any(each["name"] == "move" for each in told)


def test_spans_are_linked_to_their_continuation(events: list[Event]) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
    from penstock.report.otel import Spans

    class Read:
        name, headers = "run", [header()]

    spans: list[Any] = []
    writer = Spans(Read(), spans.append)  # type: ignore[arg-type]
    for event in events:
        writer.emit(event)
    writer.close(events[-1].at)  # type: ignore[union-attr]
    roots = {each.context.span_id: each for each in spans if each.parent is None}
    left = [each for each in roots.values() if each.attributes.get("penstock.left") == "moved"]
    assert left
    for each in left:
        (there,) = [
            link for link in each.links if link.attributes["penstock.link"] == "continued_by"
        ]
        assert there.context.trace_id == each.context.trace_id
        goes_on = roots[there.context.span_id]
        assert goes_on.attributes["gen_ai.response.id"] == each.attributes["gen_ai.response.id"]
        assert each.context.span_id in [link.context.span_id for link in goes_on.links]
