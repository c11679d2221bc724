"""Evictions: who goes first, how far, and when the asker gives up."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.core.types import Job
from penstock.policy import TABLE, evict, find
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
