"""Shortest job first with patience: its order, its mean wait against a closed form, and that nobody starves."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from penstock.core.types import Job
from penstock.policy import order
from penstock.policy.order.sjf import ASKED, CALLS, Sjf
from tests.laws.views import Columns
from tests.policy.test_order import FlatCost, ranks
from tests.policy.world import make_job


class TrueLengths:
    """Knows that a job writes exactly its max_tokens, and counts how often it is asked."""

    num_asked = 0

    def quantile(self, job: Job, q: float) -> int:
        self.num_asked += 1
        return job.max_tokens

    def quantiles(self, jobs: Sequence[Job], q: float) -> list[int]:
        return [self.quantile(job, q) for job in jobs]

    sample = quantile


def decide(policy: Sjf, waiting: list[Job], now: float = 0.0, lengths: Any = None) -> list[int]:
    view = order.View(
        now,
        random.Random(0),
        waiting,
        (),
        FlatCost(),
        lengths or TrueLengths(),
        lambda: Columns(waiting),
    )
    decision = policy.decide(view)
    order.law(view, decision)
    return [job.seq for job in decision.ranking]


def test_what_is_left_decides() -> None:
    """A token takes 10 ms, prompt or answer: 1.4, 1.2, 1.3 s; the preempted one has written 80 of its 90 tokens."""
    preempted = make_job(2, 40, output=80, max_tokens=90, arrived_at=0.0)
    preempted.num_preemptions = 1
    jobs = [
        preempted,
        make_job(0, 100, max_tokens=40, arrived_at=0.0),
        make_job(1, 20, max_tokens=100, arrived_at=0.0),
    ]
    assert decide(Sjf(patience_s=None), jobs) == [1, 2, 0]
    assert decide(Sjf(patience_s=1e9), jobs) == [1, 2, 0]


def test_without_patience_it_is_the_highest_response_ratio() -> None:
    rng = random.Random(3)
    jobs = [
        make_job(n, rng.randint(1, 900), max_tokens=rng.randint(1, 900), arrived_at=-rng.random())
        for n in range(9)
    ]

    def ratio(job: Job) -> float:
        size = (job.num_prompt + job.max_tokens) / 100
        return (10.0 - job.arrived_at + size) / size

    expected = [job.seq for job in sorted(jobs, key=ratio, reverse=True)]
    assert decide(Sjf(patience_s=0.0), jobs, now=10.0) == expected


def test_order_is_the_best_of_all_for_the_mean_wait() -> None:
    """Smith's rule, by trying all orders."""
    rng = random.Random(1)
    jobs = [
        make_job(n, rng.randint(1, 99), max_tokens=rng.randint(1, 99), arrived_at=0.0)
        for n in range(6)
    ]
    sizes = {job.seq: job.num_prompt + job.max_tokens for job in jobs}

    def total(seqs: Any) -> int:
        return sum(itertools.accumulate(sizes[seq] for seq in seqs))

    best = min(total(seqs) for seqs in itertools.permutations(sizes))
    assert total(decide(Sjf(patience_s=None), jobs)) == best < total(sizes)


def served_at(policy: Sjf, most: float) -> float | None:
    """One job of 20 s, and a newcomer of 0.5 s every half second: when the long one goes first."""
    long = make_job(0, 1900, max_tokens=100, arrived_at=0.0)
    now, waiting = 0.0, [long]
    for seq in itertools.count(1):
        waiting.append(make_job(seq, 40, max_tokens=10, arrived_at=now))
        first = decide(policy, waiting, now)[0]
        if first == 0 or now > most:
            return now if first == 0 else None
        waiting = [job for job in waiting if job.seq != first]
        now += 0.5
    raise AssertionError("unreachable")


@pytest.mark.parametrize("patience_s", [0.5, 2.0, 4.0])
def test_nobody_starves(patience_s: float) -> None:
    """A newcomer overtakes while 20 / 0.5 = 40 > 1 + wait / patience: 39 patiences, and no longer."""
    bound = patience_s * (20.0 / 0.5 - 1)
    found = served_at(Sjf(patience_s=patience_s), 1000.0)
    assert found is not None and found == pytest.approx(bound, abs=1.0)
    assert served_at(Sjf(patience_s=None), 5 * bound) is None


def test_few_lengths_are_asked_for_at_once_and_all_in_time() -> None:
    rng = random.Random(9)
    jobs = [
        make_job(n, rng.randint(1, 99), max_tokens=rng.randint(1, 999), arrived_at=0.0)
        for n in range(500)
    ]
    policy, lengths = Sjf(), TrueLengths()
    for call in range(1, 20):
        before = lengths.num_asked
        ranking = decide(policy, jobs, lengths=lengths)
        assert lengths.num_asked - before <= 2 * ASKED
        if call >= 500 / ASKED + 1:
            sizes = {job.seq: job.num_prompt + job.max_tokens for job in jobs}
            assert [sizes[seq] for seq in ranking] == sorted(sizes.values())
    before, jobs = lengths.num_asked, [make_job(1000, 1, max_tokens=1, arrived_at=0.0), *jobs[7:]]
    assert decide(policy, jobs, lengths=lengths)[0] == 1000
    assert lengths.num_asked - before <= 2 + 500 // CALLS  # the newcomer, and some in turn


def test_estimates_that_change_are_noticed() -> None:
    """Everybody is taken for equal first; after some calls the shorter answer goes first."""
    jobs = [
        make_job(0, 50, max_tokens=900, arrived_at=0.0),
        make_job(1, 51, max_tokens=900, arrived_at=0.0),
    ]
    policy = Sjf(patience_s=None)
    assert decide(policy, jobs) == [0, 1]

    class Learnt(TrueLengths):
        def quantile(self, job: Job, q: float) -> int:
            return 800 if job.seq == 0 else 100

    assert [decide(policy, jobs, lengths=Learnt()) for _ in range(3)][-1] == [1, 0]


def test_interpolated_sizes_agree_for_a_cost_that_is_linear() -> None:
    rng = random.Random(5)
    jobs = [make_job(n, rng.randint(1, 5000), max_tokens=1, arrived_at=0.0) for n in range(200)]
    by_size = np.argsort([job.num_prompt for job in jobs], kind="stable").tolist()
    assert ranks(Sjf(patience_s=None), jobs) == by_size


def test_parameters_are_checked() -> None:
    with pytest.raises(ValueError, match="quantile"):
        Sjf(quantile=1.0)
    with pytest.raises(ValueError, match="patience_s"):
        Sjf(patience_s=-1.0)
