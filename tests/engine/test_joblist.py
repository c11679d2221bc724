"""Columns say what the jobs say, whoever came, left or moved on since they were made."""

from __future__ import annotations

import dataclasses
import random

import pytest

from penstock.engine.joblist import FIXED, LIVE, MOST_TENANTS, JobList
from tests.laws.views import column_of, make_job


@pytest.mark.parametrize("is_live", [False, True])
def test_columns_equal_the_jobs(is_live: bool) -> None:
    rng = random.Random(6)
    jobs, listed = [make_job(rng, seq, 9.0) for seq in range(160)], JobList(is_live=is_live)
    for number, job in enumerate(jobs):
        if number % 3:
            listed.append(job)
        else:
            listed.push_front(job)
        if number % 7 == 6:
            listed.remove(listed.jobs[rng.randrange(len(listed))])
        if is_live:
            moved = rng.choice(listed.jobs)
            moved.num_output += 1
            moved.computed = moved.known - 1
        columns = listed.columns()
        assert len(columns) == len(listed)
        for name in (*FIXED, *LIVE):
            if name != "tenant":
                assert columns[name].tolist() == [column_of(job, name) for job in listed], name


def test_tenants_are_told_apart_however_many_came() -> None:
    rng, listed = random.Random(8), JobList(is_live=False)
    for seq in range(3 * MOST_TENANTS):
        job = make_job(rng, seq, 9.0)
        tenant = f"t{seq - seq % 3}"  # three jobs each, then never again
        job.request = dataclasses.replace(job.request, tenant=tenant)
        listed.append(job)
        if len(listed) > 30:
            listed.remove(listed.jobs[rng.randrange(30)])
        numbers = listed.columns()["tenant"].tolist()
        tenants = [job.request.tenant for job in listed]
        assert (
            len(set(zip(numbers, tenants, strict=True))) == len(set(numbers)) == len(set(tenants))
        )
    assert max(numbers) < 2 * MOST_TENANTS, "numbers are taken back"
