"""Drawn priorities: one by one and by arrays alike, fair coins, and order and victims of one mind."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from scipy import stats

from penstock.core.events import Completed
from penstock.policy import evict, order
from penstock.policy.drawn import Drawn, Pattern
from penstock.policy.evict.fastswitch import FastSwitch
from penstock.policy.order.drawn_priority import DrawnPriority
from tests.laws.views import Columns, HalfLengths, LinearCost
from tests.policy.world import make_job

STEP = Completed(at=0.0, who="r", plan=0, steps_run=25, ends=(0.0,), outputs=())


def after(num_draws: int, **more: Any) -> Drawn:
    drawn = Drawn(**{"every_steps": 25, "pattern": "random", "stay": 0.8, "seed": 3, **more})
    for _ in range(num_draws):
        drawn.observe(STEP)
    return drawn


@pytest.mark.parametrize("pattern", ["random", "markov"])
@pytest.mark.parametrize("num_draws", [0, 1, 5, 300])
def test_arrays_hold_the_numbers_of_single_jobs(pattern: Pattern, num_draws: int) -> None:
    drawn = after(num_draws, pattern=pattern)
    seqs = random.Random(1).sample(range(1 << 40), 300)
    jobs = [make_job(seq, 5) for seq in seqs]
    found = drawn.numbers(np.array(seqs, dtype=np.float64)).tolist()
    assert found == [drawn.standing(job)[0] for job in jobs]
    assert drawn.ranked(jobs) == sorted(jobs, key=drawn.standing)


def test_numbers_are_uniform_and_change() -> None:
    seqs = np.arange(5000.0)
    before, now = (after(num).numbers(seqs) for num in (6, 7))
    assert stats.kstest(before, "uniform").pvalue > 0.01
    assert abs(stats.spearmanr(before, now).statistic) < 0.05


def test_in_markov_so_many_keep_their_number() -> None:
    seqs, stay = np.arange(5000.0), 0.7
    before, now = (after(num, pattern="markov", stay=stay).numbers(seqs) for num in (40, 41))
    kept = int((before == now).sum())
    assert stats.binomtest(kept, len(seqs), stay).pvalue > 0.01
    assert stats.kstest(now, "uniform").pvalue > 0.01


def test_the_first_to_go_is_the_last_to_be_served() -> None:
    jobs: list[Any] = [make_job(seq, 5) for seq in range(100)]
    serving, leaving = DrawnPriority(seed=8), FastSwitch(seed=8)
    rng = random.Random(0)
    for _ in range(4):
        serving.observe(STEP)
        leaving.observe(STEP)
        view = order.View(0.0, rng, jobs, (), LinearCost(), HalfLengths(), lambda: Columns(jobs))
        ranking = list(serving.decide(view).ranking)
        gone = leaving.decide(evict.View(0.0, rng, 30, jobs[0], jobs, lambda item: 1))
        victims = [eviction.item for eviction in gone.evictions]
        if jobs[0] in ranking[-30:]:
            assert victims == [jobs[0]]
        else:
            assert victims == ranking[:-31:-1]
