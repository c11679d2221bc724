"""Infinite-LLM: who lends how much to whom, by the model of throughput and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec import UNSET

from penstock.core.types import JobReport, Report
from penstock.cost.phases import Phases
from penstock.policy import find, move
from penstock.policy.move import Loan
from penstock.policy.move.infinite_llm import saturated

# 10 ms a step, 0.2 us a position, 40 us a job: 256 jobs are a saturated batch.
COST = Phases(prefill=(0.0, 1e-4, 0.0), decode=(0.01, 2e-7, 4e-5))
TOTAL = 4000


def job(name: str, num_blocks: int, status: str = "running") -> JobReport:
    return JobReport(name, 0, status, 0, 0.0, 16, 1, 99, 16, num_blocks)  # type: ignore[arg-type]


def report(name: str, jobs: Sequence[JobReport] = (), *, waiting: int = 0, **fields: Any) -> Report:
    used = sum([each.num_blocks for each in jobs])
    told: dict[str, Any] = {
        "total_blocks": TOTAL,
        "free_blocks": TOTAL - used,
        "num_running": len(jobs),
        "num_decoding": len(jobs),
        "decode_tokens": 16 * used,
        "num_waiting": waiting,
        "waiting_blocks": 80 * waiting,
        "head_blocks": 80 if waiting else 0,
        "lent_blocks": 0,
        "away_blocks": 0,
        **fields,
    }
    return Report(replica=name, at=0.0, jobs=tuple(jobs), **told)


def full(name: str = "full", *, waiting: int = 30, **fields: Any) -> Report:
    """Its memory is one long request and a few short ones."""
    return report(
        name,
        [job("long", 3600), *[job(f"{name}{at}", 80) for at in range(5)]],
        waiting=waiting,
        **fields,
    )


def idle(name: str, num: int = 10) -> Report:
    return report(name, [job(f"{name}{at}", 50) for at in range(num)])


def lent(
    *reports: Report, cost: Phases | None = COST, lent: Any = None, **parameters: Any
) -> list[Loan]:
    view = move.View(0.0, random.Random(0), reports, {}, {}, lent=lent or {}, cost=cost)
    decision = find("move", "infinite-llm")(**parameters).decide(view)
    move.law(view, decision)
    assert not decision.moves
    return list(decision.loans)


def best(debtor: Report, creditor: Report, most: int) -> tuple[int, float]:
    """By trying every number of rBlocks, as the source's model has it."""

    def rate(jobs: int, tokens: int) -> float:
        return jobs / COST.decode_s(jobs, tokens)

    jobs, tokens = debtor.num_decoding, debtor.decode_tokens
    theirs, attended = creditor.num_decoding, creditor.decode_tokens
    before = rate(jobs, tokens) + rate(theirs, attended)
    found = (0, 0.0)
    for count in range(32, most + 1, 32):
        joins = min(debtor.num_waiting, (debtor.free_blocks + count) // 80)
        after = rate(jobs + joins, tokens - 16 * count + joins * 80 * 16)
        after += rate(theirs, attended + 16 * count)
        if after / before - 1 > found[1]:
            found = (count, after / before - 1)
    return found


def test_the_saturated_batch_is_where_jobs_take_as_long_as_the_step() -> None:
    assert saturated(COST) == 256
    assert saturated(Phases(prefill=(0.0, 0.0, 0.0), decode=(0.01, 0.0, 0.0))) == 4096


def test_the_longest_request_of_a_full_replica_goes_to_the_freest() -> None:
    debtor, near, far = full(), idle("near", 20), idle("far", 5)
    loans = lent(debtor, near, far)
    assert loans[0].request == "long" and loans[0].debtor == "full" and loans[0].creditor == "far"
    count, gain = best(debtor, far, 3600 - 32)
    assert gain > 0.03 and loans[0].num_blocks == min(count, (2400 - 250) // 32 * 32)
    assert lent(debtor, near, far, gain=5.0) == []
    assert lent(debtor, near, far, hop_s=1.0) == []  # round trips that cost more than a batch gains


@pytest.mark.parametrize(
    "reports",
    [
        (full(waiting=0), idle("a")),  # nobody would gain
        (full(), report("a", [job("x", 2500)])),  # used for more than 0.6
        (full(), report("a", waiting=3)),  # it is short too
        (full(), report("a", is_draining=True)),
        (full(), report("a", is_alive=False)),
        (report("many", [job(f"m{at}", 25) for at in range(158)], waiting=9), idle("a")),  # a large batch
    ],
)  # fmt: skip
def test_who_neither_lends_nor_borrows(reports: tuple[Report, ...]) -> None:
    assert lent(*reports) == []


def test_no_circle_of_debts_and_no_second_loan_before_the_first_is_used() -> None:
    other = report("a", [job("mine", 900), job("x", 50)])
    owes = {"mine": (("full", 200),)}
    assert lent(full(), other, lent=owes) == []
    via = report("b", [job("theirs", 500)])
    assert lent(full(), other, via, lent={"mine": (("b", 9),), "theirs": (("full", 9),)}) == []
    unused = {"long": (("a", 400),)}
    assert {each.request for each in lent(full(), idle("a"), lent=unused)} <= {"full4"}
    used = lent(full(away_blocks=400), idle("a"), lent=unused)
    assert [each.request for each in used] == ["long"]


def recalled(*reports: Report, lent: Any) -> list[tuple[str, str, str, int]]:
    view = move.View(0.0, random.Random(0), reports, {}, {}, lent=lent, cost=COST)
    decision = find("move", "infinite-llm")().decide(view)
    move.law(view, decision)
    assert decision.why or not decision.recalls
    return [
        (each.request, each.debtor, each.creditor, each.num_blocks) for each in decision.recalls
    ]


def test_debts_in_a_circle_are_cancelled_as_far_as_the_least_of_them_and_room_go() -> None:
    a, b, c = (report(name, [job(f"of-{name}", 900)]) for name in "abc")
    two = {"of-a": (("b", 300), ("c", 50)), "of-b": (("a", 200),)}
    assert recalled(a, b, c, lent=two) == [("of-a", "a", "b", 200), ("of-b", "b", "a", 200)]
    three = {"of-a": (("b", 300),), "of-b": (("c", 70),), "of-c": (("a", 90),)}
    assert {each[3] for each in recalled(a, b, c, lent=three)} == {70}
    assert len(recalled(a, b, c, lent=three)) == 3
    assert recalled(a, b, c, lent={"of-a": (("b", 300),), "of-b": (("c", 70),)}) == []
    tight = report("b", [job("of-b", 900), job("more", 2500)])
    assert recalled(a, tight, lent=two) == [
        ("of-a", "a", "b", 200),
        ("of-b", "b", "a", TOTAL - 3400 - TOTAL // 8 - 2 * 2 - 1),
    ]
    waiting = report("b", [job("of-b", 900)], waiting=2)
    assert recalled(a, waiting, lent=two) == [("of-a", "a", "b", 200)]


def test_of_a_request_longer_than_a_memory_only_that_comes_home_which_others_need_not_keep() -> (
    None
):
    def longer(name: str) -> Report:  # 5,000 blocks in all, of which its home works in 2,000
        told = JobReport(name, 0, "running", 0, 0.0, 16 * 3000, 1, 16 * 2000, 16, 900)
        return report(name[-1], [told])

    a, b = longer("of-a"), longer("of-b")
    assert recalled(a, b, lent={"of-a": (("b", 3000),), "of-b": (("a", 3000),)}) == []
    more = {"of-a": (("b", 3070),), "of-b": (("a", 3300),)}
    assert recalled(a, b, lent=more) == [("of-a", "a", "b", 70), ("of-b", "b", "a", 70)]
    fits = report("b", [job("of-b", 900)])
    assert recalled(a, fits, lent={"of-a": (("b", 3000),), "of-b": (("a", 300),)}) == []


def test_the_smallest_batch_is_served_first_and_memory_is_lent_once() -> None:
    others = [job(f"l{at}", 50) for at in range(50)]
    small, large = full("small"), report("large", [job("big", 1500), *others], waiting=30)
    creditor = report("a", [job("x", 1900)])
    loans = lent(large, small, creditor)
    assert loans[0].debtor == "small"
    assert sum([each.num_blocks for each in loans]) <= int(0.6 * TOTAL) - 1900


def test_without_a_model_or_lending_it_says_nothing() -> None:
    assert lent(full(), idle("a"), cost=None) == []
    assert lent(full(lent_blocks=UNSET), idle("a")) == []


@pytest.mark.parametrize(
    "wrong", [{"every_s": 0.0}, {"unit_tokens": 0}, {"small": 1.5}, {"full": 0.0}, {"gain": -1.0}]
)
def test_figures_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        find("move", "infinite-llm")(**wrong)
