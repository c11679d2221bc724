"""Evictions: who goes first, how far, and when the asker gives up."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.core.types import Job
from penstock.policy import TABLE, evict, find
from tests.laws.model_ledger import ModelLedger
from tests.policy.world import make_job

JOBS = [  # in the order of admission
    make_job(0, 10, output=5, priority=1, arrived_at=3.0),
    make_job(1, 30, output=2, priority=0, arrived_at=0.0),
    make_job(2, 20, output=2, priority=2, arrived_at=1.0),
    make_job(3, 10, output=9, priority=2, arrived_at=2.0),
]


def chosen(
    name: str, need: int, *, asker: int = 0, freed: Sequence[int] = (1, 1, 1, 1)
) -> list[int]:
    by_job = dict(zip(range(4), freed, strict=True))
    view = evict.View(0.0, random.Random(0), need, JOBS[asker], JOBS, lambda job: by_job[job.seq])  # type: ignore[union-attr]
    decision = find("evict", name)().decide(view)
    evict.law(view, decision)
    jobs: list[Job] = [eviction.item for eviction in decision.evictions]
    assert all(eviction.to == "drop" for eviction in decision.evictions)
    return [job.seq for job in jobs]


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("recompute-last", [3, 2, 1]),
        ("recompute-priority", [3, 2, 0]),  # larger priority, then later arrival; 0 gives up
        ("retract", [1, 2, 0]),  # shorter output, then longer prompt
        ("lru", [0, 1, 2]),
    ],
)
def test_order_of_leaving(name: str, order: list[int]) -> None:
    for need in (1, 2, 3):
        assert chosen(name, need) == order[:need]


def test_asker_gives_up_when_its_turn_comes() -> None:
    assert chosen("recompute-last", 3, asker=2) == [3, 2]
    assert chosen("recompute-priority", 4, asker=2) == [3, 2]
    assert chosen("retract", 3, asker=2) == [1, 2, 0]  # here the batch policy decides who must stay


def test_what_each_frees_counts() -> None:
    assert chosen("recompute-last", 3, freed=(1, 1, 0, 2)) == [3, 2, 1]
    assert chosen("recompute-last", 2, freed=(1, 1, 0, 2)) == [3]


@pytest.mark.parametrize("name", TABLE["evict"])
def test_cached_blocks_go_from_the_longest_unused_and_lazily(name: str) -> None:
    blocks: list[Any] = [SimpleNamespace(num_blocks=1, place=place) for place in range(9)]
    seen: list[int] = []

    def offered() -> Iterator[Any]:
        for block in blocks:
            seen.append(block.place)
            yield block

    view = evict.View(0.0, random.Random(0), 3, None, offered(), lambda item: 1)
    decision = find("evict", name)().decide(view)
    assert [eviction.item.place for eviction in decision.evictions] == [0, 1, 2]
    assert len(seen) <= 4, "a cache of thousands of blocks must not be walked for three of them"


OLDEST = [name for name in TABLE["evict"] if getattr(find("evict", name), "takes_oldest", False)]


@pytest.mark.parametrize("name", OLDEST)
@pytest.mark.parametrize("need", [1, 3, 7, 8, 20])
def test_who_says_so_takes_the_oldest_and_no_more(name: str, need: int) -> None:
    """The ledger does not ask a policy that claims this, so the claim is asked here."""
    blocks = [SimpleNamespace(id=number, num_blocks=1) for number in range(8)]
    view = evict.View(0.0, random.Random(0), need, None, iter(blocks), lambda item: 1)  # type: ignore[arg-type]
    decision = find("evict", name)().decide(view)
    assert [eviction.item for eviction in decision.evictions] == blocks[:need]


def prices(
    name: str, jobs: Sequence[Job], need: int, freed: Sequence[int], asker: Job | None = None
) -> list[int]:
    by_job = {job.seq: blocks for job, blocks in zip(jobs, freed, strict=True)}
    view = evict.View(
        0.0,
        random.Random(0),
        need,
        asker or make_job(99, 1),
        jobs,
        lambda job: by_job[job.seq],  # type: ignore[union-attr]
    )
    decision = find("evict", name)().decide(view)
    if asker is not None:
        evict.law(view, decision)
    found: list[Job] = [eviction.item for eviction in decision.evictions]
    return [job.seq for job in found]


def started(seq: int, computed: int) -> Job:
    return make_job(seq, computed, output=1, computed=computed)


def test_least_computed_leaves_first() -> None:
    jobs = [started(0, 40), started(1, 8), started(2, 8), started(3, 20)]
    assert [prices("least-computed", jobs, need, (1, 1, 1, 1)) for need in (1, 2, 3)] == [
        [2],
        [2, 1],
        [2, 1, 3],
    ]


@pytest.mark.parametrize("name", ["least-computed", "cheapest-per-block", "cache-aware"])
def test_an_asker_whose_turn_comes_gives_up_alone(name: str) -> None:
    jobs = [started(0, 40), started(1, 8), started(2, 20)]
    assert prices(name, jobs, 2, (1, 1, 1), asker=jobs[2]) == [
        2
    ]  # and job 1 need not leave in vain
    assert prices(name, jobs, 1, (1, 1, 1), asker=jobs[2]) == [1]


def test_blocks_that_nobody_needs_do_not_count() -> None:
    """For one block the small job is cheapest; for twelve, 100 tokens for ten blocks beat 16 for one."""
    jobs = [started(0, 100), started(1, 16), started(2, 400)]
    freed = (10, 1, 40)
    assert prices("cheapest-per-block", jobs, 1, freed) == [1]
    assert prices("cheapest-per-block", jobs, 10, freed) == [0]
    assert prices("cheapest-per-block", jobs, 12, freed) == [0, 1, 2]
    assert prices("cheapest-per-block", jobs, 30, freed) == [0, 1, 2]
    assert prices("cheapest-per-block", jobs, 40, freed) == [0, 2]


def test_whoever_frees_nothing_goes_last() -> None:
    jobs = [started(0, 4), started(1, 50), started(2, 90)]
    assert prices("cheapest-per-block", jobs, 1, (0, 3, 9)) == [1]
    assert prices("cheapest-per-block", jobs, 99, (0, 3, 9)) == [2, 1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_jobs_that_are_not_looked_at_could_not_have_been_chosen(seed: int) -> None:
    """Against the same greedy rule with everybody priced at every turn."""
    rng = random.Random(seed)
    jobs = [started(seq, rng.randint(1, 300)) for seq in range(30)]
    freed = [rng.randrange(12) for _ in jobs]
    need, left, expected = rng.randint(1, 60), list(jobs), list[int]()
    missing = need
    while missing > 0 and left:
        price = {
            j.seq: j.computed / min(freed[j.seq], missing) if freed[j.seq] else 1e99 for j in left
        }
        best = min(left, key=lambda j: (price[j.seq], j.computed, -j.seq))
        left.remove(best)
        expected.append(best.seq)
        missing -= freed[best.seq]
    assert prices("cheapest-per-block", jobs, need, freed) == expected


def test_positions_that_others_hold_cost_nothing() -> None:
    """Jobs 0 and 1 share eight of nine blocks; each has one of its own. Job 2 has two blocks, all its own."""
    ledger = ModelLedger(40, 4)
    shared = [bytes([place]) for place in range(8)]
    jobs = [make_job(seq, 34, computed=34, hashes=[*shared, bytes([100 + seq])]) for seq in (0, 1)]
    jobs.append(make_job(2, 8, computed=7))
    for each in jobs:
        assert ledger.reserve(each, each.computed)
    fork = ledger.fork()
    freed: Callable[[Any], int] = fork.freeable
    view = evict.View(0.0, random.Random(0), 1, make_job(99, 1), jobs, freed, fork)
    assert [fork.freeable(each) for each in jobs] == [1, 1, 2]

    def first(name: str, **more: float) -> int:
        return find("evict", name)(**more).decide(view).evictions[0].item.seq  # type: ignore[no-any-return]

    assert first("cache-aware") == 1  # two positions to compute again
    assert first("cheapest-per-block") == first("least-computed") == 2
    # One block is needed. Of job 3's four blocks three would stay, and one position be lost; of job 2's seven, three.
    other = make_job(3, 13, computed=13)
    assert ledger.reserve(other, 13)
    fork = ledger.fork()
    view.items, view.ledger, view.freed = [jobs[2], other], fork, fork.freeable  # type: ignore[assignment]
    assert first("cache-aware") == 2 and first("cache-aware", kept=1.0) == 3
    with pytest.raises(ValueError, match="kept"):
        find("evict", "cache-aware")(kept=1.5)
