"""Columns say what the jobs say, whoever came, left or moved on since they were made."""

from __future__ import annotations

import random

import pytest

from penstock.engine.joblist import FIXED, LIVE, JobList
from penstock.policy.order import deadline_at
from tests.laws.views import make_job


@pytest.mark.parametrize("is_live", [False, True])
def test_columns_equal_the_jobs(is_live: bool) -> None:
    rng = random.Random(6)
    jobs, listed = [make_job(rng, seq, 9.0) for seq in range(40)], JobList(is_live=is_live)
    for number, job in enumerate(jobs):
        if number % 3:
            listed.append(job)
        else:
            listed.push_front(job)
        if number % 7 == 6:
            listed.remove(listed.jobs[number // 3])
        if is_live:
            moved = rng.choice(listed.jobs)
            moved.num_output += 1
            moved.computed = moved.known - 1
        columns = listed.columns()
        assert len(columns) == len(listed)
        for name in (*FIXED, *LIVE):
            told = [
                deadline_at(job) if name == "deadline_at" else float(getattr(job, name))
                for job in listed
            ]
            assert columns[name].tolist() == told, name
