"""No starvation and honest books, for every batch, admission and eviction together; orders take turns at them.

Random jobs with shared prefixes on a replica whose memory holds a few of them: all that can ever fit finish with
exactly their tokens, those that cannot are refused, and no block stays held.
"""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from penstock.core.types import Job
from penstock.policy import TABLE, find
from tests.laws import views
from tests.laws.model_ledger import ModelLedger
from tests.policy.world import CAPS, Replica

SETS = [
    (batching, ordering, admitting, evicting)
    for (batching, admitting, evicting), ordering in zip(
        itertools.product(TABLE["batch"], TABLE["admit"], TABLE["evict"]),
        itertools.cycle(TABLE["order"]),
        strict=False,
    )
]


def crowd(rng: random.Random, num: int) -> list[Job]:
    jobs = [views.make_job(rng, seq, 5.0) for seq in range(num)]
    for job in jobs:
        job.num_output, job.first_token_at, job.last_token_at = 0, None, None
    return jobs


@pytest.mark.parametrize(
    ("batching", "ordering", "admitting", "evicting"), SETS, ids=lambda word: word
)
def test_everybody_finishes(batching: str, ordering: str, admitting: str, evicting: str) -> None:
    rng = random.Random(f"{batching} {ordering} {admitting} {evicting}")
    total = rng.choice((14, 22))
    it = Replica(
        find("batch", batching)(),
        ModelLedger(total, views.SIZE),
        find("order", ordering)(),
        admitting,
        evicting,
        dataclasses.replace(CAPS, max_batch_tokens=rng.choice((4, 30)), max_jobs=6),
        rng=rng,
    )
    jobs = crowd(rng, 14)
    it.lengths = {job.seq: rng.randrange(1, job.max_tokens + 1) for job in jobs}
    it.waiting, coming = jobs[:8], jobs[8:]
    for job in coming:
        it.step()
        it.waiting.append(job)
    it.run()
    assert sorted(job.seq for job in it.ended + it.refused) == list(range(14))
    for job in it.refused:
        assert -(-(job.num_prompt + job.max_tokens - 1) // views.SIZE) > total
        assert job.num_output == 0
    assert {job.seq: job.num_output for job in it.ended}.items() <= it.lengths.items()
    assert it.ledger.free == total and not it.ledger.tables


def test_pressure_was_real() -> None:
    """The crowd above does get preempted, and does find prefixes: otherwise that test would show little."""
    num_preempted = num_saved = 0
    for batching in TABLE["batch"]:
        for seed in range(3):
            rng = random.Random(seed)
            it = Replica(
                find("batch", batching)(),
                ModelLedger(14, views.SIZE),
                evict="retract",
                caps=dataclasses.replace(CAPS, max_jobs=6),
                rng=rng,
            )
            it.waiting = crowd(rng, 14)
            it.run()
            num_preempted += sum(job.num_preemptions for job in it.ended)
            num_saved += it.adopted_tokens
    assert num_preempted > 5 and num_saved > 50
