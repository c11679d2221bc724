"""Figures against hand-worked cases and against numpy's percentiles."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from penstock.core.events import (
    Arrived,
    Cancelled,
    Completed,
    Ended,
    Finished,
    Refused,
    Reported,
    Routed,
)
from penstock.core.types import Report, Slo
from penstock.report.histogram import REL_ERROR, Histogram
from penstock.report.metrics import Metrics
from penstock.report.summary import spread_of
from penstock.report.table import render, seconds
from penstock.report.timeline import MAX_BINS, Timeline
from tests.report import events as told

SLO = Slo(ttft_s=1.0, tpot_s=0.5)


def arrived(name: str, at: float, seq: int, who: str = "replica-0", **more) -> Arrived:
    told = {"tenant": "a", "priority": 0, "slo": SLO, "n": 1} | more
    return Arrived(
        at=at, who=who, request=name, seq=seq, model="m", num_prompt=100, max_tokens=9, **told
    )


def completed(
    at: float, plan: int, ends: tuple[float, ...], outputs, who: str = "replica-0"
) -> Completed:
    told = tuple((seq, tokens, False, ()) for seq, tokens in outputs)
    return Completed(at=at, who=who, plan=plan, steps_run=len(ends), ends=ends, outputs=told)


def finished(name: str, first, last, *, arrived_at=0.0, who="replica-0", **more) -> Finished:
    told = {
        "reason": "stop",
        "answer": 0,
        "num_output": 3,
        "tenant": "a",
        "priority": 0,
        "slo": SLO,
    }
    told |= {"num_cached": 0, "num_preemptions": 0, "num_prompt": 100} | more
    return Finished(
        at=last if last is not None else 9.0,
        who=who,
        request=name,
        arrived_at=arrived_at,
        admitted_at=arrived_at + 0.25,
        first_token_at=first,
        last_token_at=last,
        **told,
    )


def one_replica() -> list:
    return [
        arrived("x", 0.0, 0),
        arrived("y", 1.0, 1, tenant="b"),
        completed(1.5, 0, (1.5,), [(0, 1)]),  # too late for its promise
        completed(2.0, 1, (2.0,), [(0, 1), (1, 1)]),
        completed(3.0, 2, (2.5, 3.0), [(0, 2), (1, 2)]),
        finished("x", 1.5, 3.0, num_output=4, num_cached=64),
        finished("y", 2.0, 3.0, arrived_at=1.0, tenant="b", num_preemptions=2),
    ]


def test_a_hand_worked_run():
    found = Metrics().read(one_replica()).figures()
    assert found.duration_s == 3.0 and found.num_steps == 4
    assert found.all.num_offered == found.all.num_finished == 2
    assert (found.all.ttft_s.p50, found.all.ttft_s.max) == (1.0, 1.5)
    assert found.all.tpot_s.mean == pytest.approx(0.5)
    assert found.all.e2e_s.max == 3.0 and found.all.queue_s.mean == 0.25
    assert found.all.itl_s.num == 3 + 2 and found.all.itl_s.mean == pytest.approx(0.5)
    assert found.all.num_met == 1 and found.all.attainment == 0.5
    assert found.all.goodput_per_s == pytest.approx(1 / 3)
    assert found.all.output_tokens == 7 and found.all.output_tokens_per_s == pytest.approx(7 / 3)
    assert found.all.prefix_hit_rate == 0.32 and found.all.num_preemptions == 2
    assert found.tenants["a"].num_met == 0 and found.tenants["b"].num_met == 1
    assert list(found.classes) == ["priority 0, ttft 1 s, tpot 0.5 s"]


def test_a_promise_for_all_replaces_their_own():
    lenient = Metrics(Slo(ttft_s=2.0)).read(one_replica()).figures()
    assert lenient.all.num_met == 2 and list(lenient.classes) == ["priority 0, ttft 2 s"]


def test_gaps_are_those_between_tokens_whatever_the_launches():
    """One launch of three steps, three launches of one, and two tokens in one step."""
    single = [completed(t, i, (t,), [(0, 1)]) for i, t in enumerate((1.0, 1.25, 1.75))]
    repeated = [completed(1.0, 0, (1.0,), [(0, 1)]), completed(1.75, 1, (1.25, 1.75), [(0, 2)])]
    for run in (single, repeated):
        found = Metrics().read([arrived("x", 0.0, 0), *run]).figures().all.itl_s
        assert (found.num, found.max, found.mean) == (2, 0.5, 0.375)
    double = [completed(1.0, 0, (1.0,), [(0, 1)]), completed(2.0, 1, (2.0,), [(0, 2)])]
    found = Metrics().read([arrived("x", 0.0, 0), *double]).figures().all.itl_s
    assert (found.num, found.mean) == (2, 0.5)


def test_what_was_offered_and_not_served_is_a_miss():
    events = [
        *(arrived(name, 0.0, seq) for seq, name in enumerate("vwxyz")),
        Refused(at=0.1, who="replica-0", request="v", code="Overloaded", why=""),
        Cancelled(at=0.2, who="replica-0", request="w"),
        finished("w", None, None, reason="cancelled"),
        finished("x", None, None, reason="error"),
        finished("y", 0.5, 1.0),
    ]  # z never ends
    found = Metrics().read(events).figures()
    assert (found.all.num_offered, found.all.num_refused, found.all.num_cancelled) == (5, 1, 1)
    assert (found.all.num_failed, found.all.num_finished, found.all.attainment) == (1, 1, 0.2)
    assert found.errors == {"Overloaded": 1}
    assert "1 unfinished" in render(found)


def test_a_refusal_at_the_door_counts_without_an_arrival():
    found = (
        Metrics().read([Refused(at=0, who="f", request="x", code="Overloaded", why="")]).figures()
    )
    assert found.all.num_offered == found.all.num_refused == 1


def test_a_fleet_and_its_replicas_in_one_log_count_once():
    fleet = "fleet"
    events = [
        arrived("x", 0.0, 0, who=fleet),
        Routed(at=0.0, who=fleet, request="x", replica="replica-0", stage="prefill", why=""),
        *(event for event in one_replica() if event.kind != "arrived" or event.request == "x"),
        arrived("y", 1.0, 1, who=fleet, tenant="b"),
        Routed(at=1.0, who=fleet, request="y", replica=None, stage="prefill", why=""),
        Refused(at=1.0, who=fleet, request="y", code="Overloaded", why=""),
        Reported(at=1.0, who=fleet, report=Report(replica="replica-0", at=0.9)),
        Ended(at=3.0, who=fleet, request="x", replica="replica-0"),
    ]
    found = Metrics().read(events).figures()
    assert found.all.num_offered == 2 and found.all.num_refused == 1


def turned_away(who: str, name: str, at: float, replica: str) -> list:
    """What a log says of a request that a replica turns away, in order."""
    return [
        Routed(at=at, who=who, request=name, replica=replica, stage="prefill", why=""),
        Refused(at=at, who=replica, request=name, code="Overloaded", why=""),
        Ended(at=at, who=who, request=name, replica=replica),
    ]


def test_a_request_that_every_replica_turned_away_is_one_refusal():
    fleet = "fleet"
    events = [
        arrived("x", 0.0, 0, who=fleet),
        *turned_away(fleet, "x", 0.0, "replica-0"),
        *turned_away(fleet, "x", 0.0, "replica-1"),
        Routed(at=0.0, who=fleet, request="x", replica=None, stage="prefill", why=""),
        Refused(at=0.0, who=fleet, request="x", code="Overloaded", why=""),
        arrived("y", 1.0, 0, who=fleet),
        *turned_away(fleet, "y", 1.0, "replica-0"),
        Routed(at=1.0, who=fleet, request="y", replica="replica-1", stage="prefill", why=""),
        arrived("y", 1.0, 0, who="replica-1"),
        finished("y", 1.5, 2.0, arrived_at=1.0, who="replica-1"),
        Ended(at=2.0, who=fleet, request="y", replica="replica-1"),
    ]
    metrics = Metrics().read(events)
    found = metrics.figures()
    assert (found.all.num_offered, found.all.num_refused, found.all.num_finished) == (2, 1, 1)
    assert found.all.attainment == 0.5 and found.errors == {"Overloaded": 1}
    assert len(found.classes) == len(found.tenants) == 1
    assert not metrics._offers[fleet].open


def test_nothing_is_kept_of_what_ended():
    metrics = Metrics()
    for number in range(1000):
        name = f"r{number}"
        metrics.emit(arrived(name, number, number))
        metrics.emit(completed(number + 0.5, number, (number + 0.5,), [(number, 1)]))
        metrics.emit(finished(name, number + 0.5, number + 0.5, arrived_at=number))
    assert not metrics._seqs and not metrics._offers["replica-0"].open
    assert not metrics._heard["replica-0"]


def test_several_answers_of_one_request():
    events = [
        arrived("x", 0.0, 0, n=2),
        completed(0.5, 0, (0.5,), [(0, 1), (1, 1)]),
        completed(1.0, 1, (1.0,), [(0, 1), (1, 1)]),
        finished("x", 0.5, 1.0, num_output=2),
        finished("x", 0.5, 1.0, num_output=2, answer=1),
    ]
    found = Metrics().read(events).figures()
    assert found.all.num_offered == found.all.num_met == 2 and found.all.itl_s.num == 2


def test_json_is_whole():
    told = json.loads(json.dumps(Metrics().read(one_replica()).figures().to_dict()))
    assert told["all"]["ttft_s"]["p50"] == 1.0 and set(told["tenants"]) == {"a", "b"}


def test_nothing_measured_is_none_and_dashes():
    found = Metrics().figures()
    assert found.all.attainment is None and found.all.ttft_s.p99 is None
    assert "0 offered" in render(found)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=300))
def test_percentiles_are_numpys(values):
    found, spread = Histogram(), spread_of(values)
    for value in values:
        found.add(value)
    for percent in (50, 90, 95, 99):
        exact = np.percentile(values, percent, method="inverted_cdf")
        assert getattr(spread, f"p{percent}") == exact
        assert found.percentile(percent) == pytest.approx(exact, rel=REL_ERROR * 1.001)
    assert found.num == len(values) and found.most == max(values)
    assert found.mean == pytest.approx(np.mean(values))


def test_histograms_merge_and_hold_zeros():
    chance = random.Random(0)
    parts, whole = [Histogram(), Histogram()], Histogram()
    for _ in range(1000):
        value = chance.choice((0.0, chance.lognormvariate(-3, 1)))
        parts[chance.randrange(2)].add(value)
        whole.add(value)
    parts[0].merge(parts[1])
    assert parts[0].counts == whole.counts and parts[0].num == 1000
    assert parts[0].percentile(10) == 0.0 and parts[0].percentile(99) == whole.percentile(99)


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e2)), min_size=1, max_size=50))
def test_gaps_added_at_once_are_the_same(gaps):
    instants = [0.0]
    for gap in gaps:
        instants.append(instants[-1] + gap)
    one, many = Histogram(), Histogram()
    for before, after in zip(instants, instants[1:], strict=False):
        one.add(after - before, 3)
    many.add_gaps(instants, 3)
    for percent in (10, 50, 90):  # a gap on a bucket's border may fall on either side of it
        assert many.percentile(percent) == pytest.approx(one.percentile(percent), rel=0.011)
    assert (many.num, many.least, many.most) == (one.num, one.least, one.most)
    assert many.total == pytest.approx(one.total)


def test_a_timeline_is_bounded_and_sums_its_sources():
    line = Timeline(width_s=0.001)
    for step in range(50_000):
        line.add(f"client-{step % 2}", step * 0.01, 1 + step % 2, 5)
    bins = line.bins()
    assert len(bins) <= MAX_BINS
    assert {each.running for each in bins[1:]} == {3} and {each.waiting for each in bins[1:]} == {
        10
    }


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "-"),
        (0, "0"),
        (2e-5, "20 us"),
        (0.0123, "12.3 ms"),
        (0.25, "250 ms"),
        (12.3, "12.30 s"),
    ],
)
def test_durations_are_told_in_their_unit(value, told):
    assert seconds(value) == told


def test_the_table_names_what_it_shows():
    told = render(Metrics().read(one_replica()).figures(notes=("a guess",)), "run")
    for word in ("TTFT", "TPOT", "ITL", "E2E", "queue", "goodput", "by tenant", "note: a guess"):
        assert word in told


def test_without_a_promise_none_is_said_to_be_kept():
    unpromised = [
        replace(event, slo=Slo()) if hasattr(event, "slo") else event for event in one_replica()
    ]
    assert "no promise was stated" in render(Metrics().read(unpromised).figures())
    assert "kept their promise" in render(Metrics().read(one_replica()).figures())


def test_a_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from penstock.report.plot import plot

    metrics, line = Metrics().read(one_replica()), Timeline()
    line.add("client", 0.0, 1, 0)
    line.add("client", 2.0, 2, 1)
    path = tmp_path / "run.png"
    plot(
        path,
        ttft_s=metrics.samples("ttft_s"),
        tpot_s=metrics.samples("tpot_s"),
        bins=line.bins(),
        bounds_s=(1.0, None),
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    plot(tmp_path / "empty.png", ttft_s=[], tpot_s=[], bins=[])


def test_what_was_left_of_a_promise_makes_no_class_of_its_own() -> None:
    """A request that waited in its fleet reaches its replica with the rest of what it was promised."""
    asked = told.arrived(0.0, 0, who="fleet", slo=Slo(ttft_s=1.0))
    here = told.arrived(0.7, 0, slo=Slo(ttft_s=0.3))
    events = [
        asked,
        told.routed(0.7, 0, ""),
        here,
        told.finished(1.5, here, num_output=2, first_at=0.9),
    ]
    figures = Metrics().read(events).figures()
    assert list(figures.classes) == ["priority 0, ttft 1 s"]
    assert figures.all.num_offered == figures.all.num_met == 1
