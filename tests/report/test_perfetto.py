"""The trace file: what its readers require, and that it says what the log says."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import BadConfig
from penstock.core.events import Completed, Event, Finished, Stepped
from penstock.report.perfetto import write_trace
from tests.report.events import arrived, born, completed, header, played, routed, stepped

ASKS = [(0.02 * i, 20 + i, 5 + i) for i in range(25)]


def trace_of(events: list[Event], tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "sub" / "trace.json"
    num = write_trace(events, path)
    told = json.loads(path.read_text())
    assert (
        set(told) <= {"traceEvents", "displayTimeUnit", "metadata"}
        and len(told["traceEvents"]) == num
    )
    found: list[dict[str, Any]] = told["traceEvents"]
    return found


@pytest.fixture(scope="module")
def events() -> list[Event]:
    log = played(ASKS, num_blocks=40, max_jobs=6)
    assert any(event.evicted for event in log if isinstance(event, Stepped)), "it has preemptions"
    return log


def test_every_event_has_what_its_phase_requires_in_the_order_of_time(
    events: list[Event], tmp_path: Path
) -> None:
    last = 0.0
    for event in trace_of(events, tmp_path):
        assert event["ph"] in "MCXibe" and isinstance(event["pid"], int) and event["name"]
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and event["args"]["name"]
            continue
        assert event["ts"] >= last, "sorted by time"
        last = event["ts"]
        if event["ph"] == "X":
            assert event["dur"] > 0 and event["tid"] >= 1
        elif event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
        elif event["ph"] in "be":
            assert event["cat"] == "request" and event["id2"]["local"].startswith("0x")


def test_every_begin_has_its_end_inside_its_parent(events: list[Event], tmp_path: Path) -> None:
    open_: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
    num = 0
    for event in trace_of(events, tmp_path):
        if event["ph"] in "be":
            stack = open_[event["pid"], event["id2"]["local"]]
            if event["ph"] == "b":
                stack.append(event["name"])
                assert len(stack) <= 2, "a phase inside its answer"
            else:
                assert stack.pop() == event["name"]
                num += 1
    assert not any(open_.values())
    assert num > 3 * len(ASKS)


def test_slices_of_a_lane_are_the_launches_and_do_not_overlap(
    events: list[Event], tmp_path: Path
) -> None:
    slices = [event for event in trace_of(events, tmp_path) if event["ph"] == "X"]
    launches = [event for event in events if isinstance(event, Completed)]
    assert len(slices) == len(launches)
    assert sum(each["args"]["steps"] for each in slices) == sum(each.steps_run for each in launches)
    end = 0.0
    for each in slices:
        assert each["ts"] >= end - 0.002  # a nanosecond of rounding on both sides
        end = each["ts"] + each["dur"]
    last = max(event.ends[-1] for event in launches)
    assert end == pytest.approx(last * 1e6, abs=0.01)


def test_phases_say_what_happened(events: list[Event], tmp_path: Path) -> None:
    told = Counter(event["name"] for event in trace_of(events, tmp_path) if event["ph"] == "b")
    ends = [event for event in events if isinstance(event, Finished)]
    assert told["queue"] == told["prefill"] == len(ends)
    assert (
        told["preempted"] == told["recompute"] == sum(event.num_preemptions for event in ends) > 0
    )
    assert all(told[event.request] == 1 for event in ends)


def test_a_repeated_launch_is_one_slice_that_says_so(tmp_path: Path) -> None:
    log: list[Event] = [
        header(), routed(0.0, 0, "0 outstanding"), born(), arrived(0.0, 0),
        stepped(0.0, 0, [(0, 100)], admitted=(0,)), completed(0, [0.1], [0]),
        stepped(0.1, 1, [(0, 1)], repeat=3), completed(1, [0.2, 0.3, 0.4], [0]),
    ]  # fmt: skip
    told = trace_of(log, tmp_path)
    slices = [(event["name"], event["ts"], event["dur"]) for event in told if event["ph"] == "X"]
    assert slices == [
        ("100 tokens of 1", 0.0, 100_000.0),
        ("1 x decode, 3 steps", 100_000.0, 300_000.0),
    ]
    assert [event["args"]["why"] for event in told if event["ph"] == "i"] == ["0 outstanding"]
    unfinished = [event for event in told if event["ph"] == "e" and event["name"] == "r0"]
    assert unfinished[0]["args"] == {"reason": "unfinished"} and unfinished[0]["ts"] == 400_000.0


def test_a_place_that_cannot_be_written_is_an_error_a_user_can_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match="cannot write the trace"):
        write_trace([header()], tmp_path / "file" / "trace.json")
