"""Orders: by arrival, by priority, by deadline, and by deadline among those who can still make it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from penstock.core.types import Job, Slo
from penstock.policy import find, order
from penstock.policy.order import FEW, STABLE
from penstock.policy.order.slack_edf import SlackEdf
from tests.laws.views import Columns, HalfLengths, LinearCost, order_view
from tests.policy.world import make_job


class FlatCost:
    """A second a hundred tokens."""

    def predict(self, chunks: Sequence[Any], share: float = 1.0) -> float:
        return sum(chunk.tokens for chunk in chunks) / 100


def ranks(policy: Any, waiting: Sequence[Job], now: float = 0.0, cost: Any = None) -> list[int]:
    view = order.View(
        now,
        random.Random(0),
        waiting,
        (),
        cost or FlatCost(),
        HalfLengths(),
        lambda: Columns(waiting),
    )
    decision = policy.decide(view)
    order.law(view, decision)
    return [job.seq for job in decision.ranking]


def test_fcfs_is_the_queue_itself() -> None:
    view = order_view(random.Random(3))
    decision = find("order", "fcfs")().decide(view)
    assert decision.ranking is view.waiting and decision.stable_for == STABLE


def test_priority_then_arrival() -> None:
    jobs = [
        make_job(0, 5, priority=1, arrived_at=0.0),
        make_job(1, 5, priority=0, arrived_at=9.0),
        make_job(2, 5, priority=1, arrived_at=-1.0),
        make_job(3, 5, priority=0, arrived_at=9.0),
    ]
    assert ranks(find("order", "priority")(), jobs) == [1, 3, 2, 0]


def test_deadline_is_the_next_promise() -> None:
    slo = Slo(ttft_s=2.0, tpot_s=0.5, deadline_s=30.0)
    fresh = make_job(0, 5, arrived_at=10.0, slo=slo)
    assert order.deadline_at(fresh) == 12.0
    preempted = make_job(1, 5, arrived_at=10.0, output=4, slo=slo)
    preempted.first_token_at = 11.0
    assert order.deadline_at(preempted) == 13.0  # the fifth token, four gaps after the first
    late = make_job(2, 5, arrived_at=10.0, output=90, slo=slo)
    late.first_token_at = 11.0
    assert order.deadline_at(late) == 40.0
    assert order.deadline_at(make_job(3, 5)) == float("inf")


def test_edf_puts_jobs_without_a_promise_last_in_their_order() -> None:
    jobs = [
        make_job(0, 5),
        make_job(1, 5, arrived_at=5.0, slo=Slo(ttft_s=1.0)),
        make_job(2, 5),
        make_job(3, 5, arrived_at=0.0, slo=Slo(deadline_s=2.0)),
    ]
    assert ranks(find("order", "edf")(), jobs) == [3, 1, 0, 2]


@pytest.mark.parametrize("name", ["priority", "edf"])
def test_arrays_and_plain_sorting_rank_alike(name: str) -> None:
    rng = random.Random(7)
    jobs = [
        make_job(
            seq,
            rng.randrange(1, 99),
            priority=rng.randrange(3),
            arrived_at=float(rng.randrange(20)),
            slo=Slo(ttft_s=rng.choice((None, 1.0, 2.0)), deadline_s=rng.choice((None, 2.0, 9.0))),
        )
        for seq in range(3 * FEW)
    ]
    many = ranks(find("order", name)(), jobs)
    key = (lambda j: (j.priority, j.arrived_at, j.seq)) if name == "priority" else order.deadline_at
    assert many == [job.seq for job in sorted(jobs, key=key)]


def test_jobs_that_cannot_make_it_stand_behind_those_who_can() -> None:
    """Now is 10, a hundred tokens are a second. Deadlines 11, 12, 12.5; job 0 still needs 3 s and cannot."""
    jobs = [
        make_job(0, 300, arrived_at=9.0, slo=Slo(ttft_s=2.0)),
        make_job(1, 100, arrived_at=9.0, slo=Slo(ttft_s=3.0)),
        make_job(2, 100, arrived_at=9.0, slo=Slo(ttft_s=3.5)),
    ]
    assert ranks(find("order", "edf")(), jobs, now=10.0) == [0, 1, 2]
    assert ranks(SlackEdf(), jobs, now=10.0) == [1, 2, 0]
    assert ranks(SlackEdf(), jobs, now=8.0) == [0, 1, 2]  # two seconds earlier all can


def test_demoted_jobs_go_latest_deadline_first_behind_jobs_without_a_promise() -> None:
    jobs = [
        make_job(0, 100, arrived_at=0.0, slo=Slo(ttft_s=1.0)),
        make_job(1, 100, arrived_at=0.0, slo=Slo(ttft_s=2.0)),
        make_job(2, 100),
        make_job(3, 100, arrived_at=9.0, slo=Slo(ttft_s=5.0)),
    ]
    assert ranks(SlackEdf(), jobs, now=10.0) == [3, 2, 1, 0]


def test_priority_is_the_published_formula() -> None:
    """sign(slack) / deadline, highest first, on random jobs with positive deadlines."""
    rng = random.Random(11)
    jobs = [
        make_job(
            seq,
            rng.randrange(1, 900),
            arrived_at=rng.uniform(1, 20),
            slo=Slo(ttft_s=rng.uniform(1, 9)),
        )
        for seq in range(60)
    ]

    def value(job: Job) -> float:
        deadline = job.arrived_at + (job.request.slo.ttft_s or 0)
        slack = deadline - 15.0 - job.num_prompt / 100
        return (1 if slack >= 0 else -1) / deadline

    expected = [job.seq for job in sorted(jobs, key=value, reverse=True)]
    assert ranks(SlackEdf(), jobs, now=15.0) == expected


def test_whole_answers_count_their_expected_tokens() -> None:
    """100 prompt tokens and half of 200 output tokens: 1 + 99 * 0.01 s; at the quantile 0.9 it is 2.79 s."""
    other = make_job(1, 100, arrived_at=0.0, slo=Slo(ttft_s=9.0))
    job = make_job(0, 100, arrived_at=0.0, max_tokens=200, slo=Slo(deadline_s=2.5))
    assert ranks(SlackEdf(), [job, other], now=0.505) == [0, 1]
    assert ranks(SlackEdf(), [job, other], now=0.515) == [1, 0]
    assert ranks(SlackEdf(quantile=0.9), [job, other], now=0.0) == [1, 0]


def test_margin_demotes_earlier() -> None:
    jobs = [make_job(0, 100, arrived_at=0.0, slo=Slo(ttft_s=2.0)), make_job(1, 100)]
    assert ranks(SlackEdf(), jobs, now=0.9) == [0, 1]
    assert ranks(SlackEdf(margin_s=0.2), jobs, now=0.9) == [1, 0]


def test_predictions_between_sizes_agree_with_single_ones() -> None:
    """Beyond FEW jobs the cost is interpolated; for a cost linear in tokens that is exact."""
    rng = random.Random(5)
    jobs = [
        make_job(
            seq,
            rng.randrange(1, 900),
            arrived_at=rng.uniform(1, 20),
            slo=Slo(ttft_s=rng.uniform(1, 9)),
        )
        for seq in range(4 * FEW)
    ]
    demoted = {
        job.seq
        for job in jobs
        if order.deadline_at(job) - 12.0 - LinearCost().predict([_Whole(job)]) < 0
    }
    ranking = ranks(SlackEdf(), jobs, now=12.0, cost=LinearCost())
    assert 0 < len(demoted) < len(jobs)
    assert set(ranking[len(jobs) - len(demoted) :]) == demoted


class _Whole:
    def __init__(self, job: Job) -> None:
        self.job, self.tokens = job, job.todo
