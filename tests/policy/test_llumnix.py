"""Llumnix: which request leaves which replica, where new ones go, and how many replicas there are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from penstock.core.types import JobReport, Report, Request
from penstock.policy import find, move, route, scale
from penstock.policy.loads import Sent
from tests.policy.test_route import request_of

JOB = JobReport(
    request="r", answer=0, status="running", priority=0, waited_s=0.0, num_prompt=16, num_output=1,
    max_tokens=99, computed=16, num_blocks=10,
)  # fmt: skip


def job(name: str, **changes: Any) -> JobReport:
    told = {field: getattr(JOB, field) for field in JOB.__struct_fields__}
    return JobReport(**{**told, "request": name, **changes})


def report(name: str, free: int, jobs: Sequence[JobReport] = (), **fields: Any) -> Report:
    return Report(
        replica=name,
        at=0.0,
        total_blocks=100,
        free_blocks=free,
        num_running=len(jobs),
        jobs=tuple(jobs),
        **fields,
    )


def moved(
    *reports: Report, moving: dict[str, str] | None = None, **parameters: Any
) -> list[tuple[str, ...]]:
    view = move.View(0.0, random.Random(0), reports, {}, moving or {})
    decision = find("move", "llumnix")(**parameters).decide(view)
    move.law(view, decision)
    return [(each.request, each.source, each.target, each.mode) for each in decision.moves]


def test_the_shortest_leaves_the_fullest_for_the_freest() -> None:
    full = report(
        "a", 2, [job("long", num_blocks=60), job("short", num_blocks=20), job("mid", num_blocks=30)]
    )
    fuller = report("b", 0, [job("one", num_blocks=40), job("two", num_blocks=50)])
    free, freer = report("c", 60, [job("x")]), report("d", 90, [job("y")])
    assert moved(full, fuller, free, freer) == [
        ("one", "b", "d", "live"),
        ("short", "a", "c", "live"),
    ]


def test_urgent_ones_stay_and_small_ones_need_no_stages() -> None:
    full = report(
        "a", 0, [job("now", priority=-1, num_blocks=1), job("usual", num_blocks=9)], num_urgent=1
    )
    assert moved(full, report("b", 90)) == [("usual", "a", "b", "blocking")]


def test_a_head_of_line_that_does_not_fit_makes_room_for_itself() -> None:
    jobs = [job("a", num_blocks=50)]
    blocked = report("a", 30, jobs, head_blocks=29, num_waiting=1)
    assert moved(blocked, report("b", 90)) == [("a", "a", "b", "live")]
    assert moved(report("a", 30, jobs), report("b", 90)) == []  # nobody waits: nothing moves


def test_nobody_goes_where_it_does_not_fit_or_twice_or_before_its_prompt_is_done() -> None:
    full = report("a", 1, [job("big", num_blocks=95)])
    assert moved(full, report("b", 90)) == []
    full = report("a", 1, [job("r")])
    assert moved(full, report("b", 90), moving={"r": "b"}) == []
    full = report("a", 1, [job("r", computed=3), job("q", status="waiting")])
    assert moved(full, report("b", 90)) == []


def test_what_a_running_prompt_will_take_is_not_free() -> None:
    jobs = [job("r", num_blocks=30), job("s", computed=3)]
    prompt = report("a", 40, jobs, prefill_tokens=16 * 36)
    assert moved(prompt, report("b", 90)) == [("r", "a", "b", "live")]
    taker = report("b", 60, [job("x", computed=3)], prefill_tokens=16 * 35)
    assert moved(report("a", 1, [job("r", num_blocks=30)]), taker) == []


def test_who_was_preempted_gets_room_and_nobody_comes_where_somebody_waits() -> None:
    back = job("back", status="waiting", num_output=5, num_blocks=0)
    short = report("a", 60, [job("r", num_blocks=30), back], num_waiting=1)
    assert moved(short, report("b", 90)) == [("r", "a", "b", "live")]
    fresh = job("new", status="waiting", num_output=0, num_blocks=0)
    usual = report("a", 60, [job("r", num_blocks=30), fresh], num_waiting=1)
    assert moved(usual, report("b", 90)) == []
    busy = report("b", 90, [job("y")], num_waiting=1)
    assert moved(report("a", 1, [job("r")]), busy) == []


def test_whoever_has_moved_is_left_out_until_its_old_replica_reports_without_it() -> None:
    policy = find("move", "llumnix")()

    def asked(now: float, at: float, **fields: Any) -> list[str]:
        jobs = [job("r", num_blocks=30), job("s", num_blocks=40)]
        full = msgspec.structs.replace(report("a", 1, jobs, **fields), at=at)
        view = move.View(now, random.Random(0), (full, report("b", 90)), {}, {})
        return [each.request for each in policy.decide(view).moves]

    assert asked(0.0, 0.0) == ["r"]
    assert asked(0.05, 0.0) == ["s"]
    assert asked(0.1, 0.0) == []  # both have moved, and the report does not know
    assert asked(0.15, 0.12, moving_out=1) == []  # made while they were leaving
    assert asked(0.2, 0.19) == ["r"]  # they are back, or were refused
    assert asked(2.3, -1000.0) == ["r"]  # the clock of another host: nobody is held back for long


def test_all_leave_a_replica_that_drains_and_none_come() -> None:
    leaving = report("a", 95, [job("r")], is_draining=True)
    assert moved(leaving, report("b", 50)) == [("r", "a", "b", "blocking")]
    assert moved(report("a", 1, [job("r")]), report("b", 90, is_draining=True)) == []


def test_balanced_pairs_do_not_overshoot() -> None:
    giver = report("a", 5, [job("r", num_blocks=60), job("s", num_blocks=61)])
    taker = report("b", 70, [job("x", num_blocks=30)])
    assert moved(giver, taker) != []
    assert moved(giver, taker, balanced=True) == []  # b would be left with less than a has then


def routed(
    *reports: Report,
    sent: dict[str, Sent] | None = None,
    request: Request | None = None,
    **parameters: Any,
) -> str | None:
    policy = find("route", "llumnix")(**parameters)
    view = route.View(
        0.0, random.Random(0), request or request_of(), "prefill", reports, {}, sent=sent or {}
    )
    decision = policy.decide(view)
    route.law(view, decision)
    return decision.replica  # type: ignore[no-any-return]


def test_requests_go_where_each_job_has_most_left() -> None:
    many, few = report("a", 60, [JOB] * 6), report("b", 40, [JOB] * 2)
    assert routed(many, few) == "b"
    assert routed(many, few, metric="kv_ratio") == "a"
    assert routed(many, few, sent={"b": Sent(2, 400, 30)}) == "a"  # it has not said so yet
    urgent = report("b", 40, [JOB] * 2, num_urgent=1)
    assert routed(many, urgent, urgent_blocks=50) == "a"  # headroom keeps usual requests off
    waiting = report("b", 40, [JOB] * 2, num_waiting=3, waiting_blocks=39, head_blocks=9)
    assert routed(many, waiting, metric="steps") == "a"


def test_sizes_follow_the_mean_freeness() -> None:
    def scaled(*reports: Report, starting: int = 0, most: int = 4) -> scale.Decision:
        bounds = scale.Bounds(least=1, most=most)
        view = scale.View(
            0.0, random.Random(0), reports, {}, bounds, {"any": starting} if starting else {}
        )
        decision = find("scale", "llumnix")().decide(view)
        scale.law(view, decision)
        return decision  # type: ignore[no-any-return]

    full = [report(name, 4, [JOB] * 2) for name in "abc"]
    assert scaled(*full).add == {"any": 1}
    assert scaled(*full, most=3) == scale.Decision()
    assert scaled(*full, starting=1) == scale.Decision()  # one is on its way, and it will be empty
    idle = [report("a", 90, [JOB]), report("b", 100), report("c", 70, [JOB])]
    assert scaled(*idle).drain == ("b",)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("move", {"low": 4.0}),
        ("move", {"every_s": 0.0}),
        ("scale", {"least": 70.0}),
        ("route", {"urgent_blocks": -1}),
    ],
)
def test_parameters_that_make_no_sense_are_refused(kind: str, field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        find(kind, "llumnix")(**field)
