"""Offline work that goes to writers: who takes which request, and who has no time or room for one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from penstock.core.types import JobReport, Report
from penstock.cost.phases import Phases
from penstock.policy import find, move

# 10 ms a step, 1 us a position, 100 us a job: 128 jobs take 1.39 times as long as 64, and 256 take 1.56 times as
# long as 128, which are a saturated batch.
COST = Phases(prefill=(0.0, 1e-4, 0.0), decode=(0.01, 1e-6, 1e-4))
SIZE, TOTAL = 16, 10_000


def job(name: str, length: int, priority: int = 1, **changes: Any) -> JobReport:
    told: dict[str, Any] = {
        "request": name, "answer": 0, "status": "running", "priority": priority, "waited_s": 0.0,
        "num_prompt": length - 1, "num_output": 1, "max_tokens": 1, "computed": length - 1,
        "num_blocks": -(-length // SIZE),
    }  # fmt: skip
    return JobReport(**{**told, **changes})


def report(name: str, role: str, jobs: Sequence[JobReport] = (), **fields: Any) -> Report:
    told: dict[str, Any] = {
        "total_blocks": TOTAL,
        "free_blocks": TOTAL - sum([each.num_blocks for each in jobs]),
        "block_size": SIZE,
        "num_running": len(jobs),
        "num_decoding": len(jobs),
        "decode_tokens": sum([each.num_prompt + each.num_output for each in jobs]),
        "step_s": 0.02,
    }
    return Report(replica=name, at=0.0, role=role, jobs=tuple(jobs), **{**told, **fields})  # type: ignore[arg-type]


def asked(policy: Any, *reports: Report, now: float = 0.0, **fields: Any) -> list[tuple[str, ...]]:
    told: dict[str, Any] = {"outstanding": {}, "moving": {}, "cost": COST, **fields}
    view = move.View(now, random.Random(0), reports, **told)
    decision = policy.decide(view)
    move.law(view, decision)
    assert all(each.mode == "live" for each in decision.moves)
    return [(each.request, each.source, each.target) for each in decision.moves]


def pulled(*reports: Report, parameters: Any = None, **fields: Any) -> list[tuple[str, ...]]:
    return asked(find("move", "offline")(**(parameters or {})), *reports, **fields)


LENGTHS = (20, 100, 180, 250, 400, 2_000)


def giver(name: str = "p", role: str = "prefill", **fields: Any) -> Report:
    return report(name, role, [job(f"{name}{length}", length) for length in LENGTHS], **fields)


@pytest.mark.parametrize("num", [0, 20, 60, 100, 119])
def test_the_length_that_fills_the_saturated_batch_is_taken(num: int) -> None:
    there = [job(f"o{at}", 100, priority=0) for at in range(num)]
    # 45 ms = 10 + 0.1 * 128 + 1e-3 * positions: 22,200, less those that are there, over the jobs that are missing
    preferred = (22_200 - 100 * num) / (128 - num)
    nearest = min(LENGTHS, key=lambda length: abs(length - preferred))
    assert pulled(giver(), report("d", "decode", there)) == [(f"p{nearest}", "p", "d")]


def test_nobody_takes_one_with_which_the_next_step_is_too_long() -> None:
    there = [
        job(f"o{at}", 200, priority=0) for at in range(127)
    ]  # 48.1 ms, and 48.2 + length / 1000
    writer, parameters = report("d", "decode", there), {"tpot_s": 0.04851 / 0.9}
    near = report("p", "prefill", [job("short", 250), job("long", 340)])  # 310 keep the limit
    assert pulled(near, writer, parameters=parameters) == [("short", "p", "d")]
    long = report("p", "prefill", [job("long", 340)])
    assert pulled(long, writer, parameters=parameters) == []
    assert pulled(long, writer, parameters={"tpot_s": 0.04855 / 0.9}) == [("long", "p", "d")]


def test_only_offline_ones_that_decode_are_taken_and_none_twice() -> None:
    jobs = [
        job("online", 170, priority=0),
        job("urgent", 170, priority=-1),
        job("prompt", 170, computed=9),
        job("waits", 170, status="waiting"),
    ]
    writer = report("d", "decode")
    assert pulled(report("p", "prefill", jobs), writer) == []
    both = report("p", "any", [*jobs, job("offline", 20)])
    assert pulled(both, writer) == [("offline", "p", "d")]
    assert pulled(both, writer, moving={"offline": "x"}) == []


def test_a_writer_waits_for_the_one_that_is_on_its_way() -> None:
    assert pulled(giver(), report("d", "decode"), moving={"p20": "d"}) == []
    others = pulled(giver(), report("d", "decode"), report("e", "decode"), moving={"p20": "d"})
    assert [target for _, _, target in others] == ["e"]
    online = report("q", "prefill", [job("online", 40_000, priority=0)])  # and counts online ones
    assert pulled(giver(), online, report("d", "decode")) != []
    assert pulled(giver(), online, report("d", "decode"), moving={"online": "d"}) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"step_s": 0.046, "num_running": 1},
        {"num_decoding": 351},
        {"free_blocks": 999},
        {"is_draining": True},
        {"is_suspect": True},
        {"is_alive": False},
        {"role": "any"},
    ],
)
def test_who_takes_none(fields: dict[str, Any]) -> None:
    assert pulled(giver(), report("d", **{"role": "decode", **fields})) == []


def test_an_old_step_of_a_replica_that_is_idle_says_nothing() -> None:
    assert pulled(giver(), report("d", "decode", step_s=0.1)) != []


def test_memory_is_to_last_for_what_will_yet_be_written() -> None:
    grows = report("p", "prefill", [job("grows", 160, max_tokens=1_000)])  # 10 blocks, and 16 more
    assert pulled(grows, report("d", "decode", free_blocks=1_026)) == [("grows", "p", "d")]
    assert pulled(grows, report("d", "decode", free_blocks=1_025)) == []
    there = report("d", "decode", [job("o", 160, 0, max_tokens=99)], free_blocks=1_026)
    assert pulled(grows, there) == []
    short = report("p", "prefill", [job("short", 160)])
    assert pulled(short, report("d", "decode", free_blocks=1_010)) == [("short", "p", "d")]


def test_each_gives_one_and_the_idlest_is_served_first() -> None:
    busy = report("d", "decode", [job("o", 100, priority=0)])
    moves = pulled(giver("p"), busy, report("e", "decode"))
    assert [(source, target) for _, source, target in moves] == [("p", "e")]
    moves = pulled(giver("p"), giver("q", "any"), busy, report("e", "decode"))
    assert sorted(target for _, _, target in moves) == ["d", "e"]
    assert sorted(source for _, source, _ in moves) == ["p", "q"]


def test_one_that_did_not_come_is_asked_for_again_later() -> None:
    policy, reports = find("move", "offline")(), (giver(), report("d", "decode"))
    first, second = asked(policy, *reports), asked(policy, *reports, now=0.1)
    assert first and second and first != second
    assert asked(policy, *reports, now=10.0) == first


def test_without_a_cost_model_nothing_is_asked_for() -> None:
    assert pulled(giver(), report("d", "decode"), cost=None) == []


@pytest.mark.parametrize(
    "wrong",
    [{"tpot_s": 0.0}, {"every_s": 0.0}, {"share": 1.1}, {"full": 0.0}, {"ahead_tokens": -1}, {"again_s": -1.0}],
)  # fmt: skip
def test_parameters_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        find("move", "offline")(**wrong)
