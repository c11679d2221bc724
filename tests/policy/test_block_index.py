"""What replicas hold, as their fleet knows it: equal to the truth once all was heard, whatever happened in between."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.messages import BlockNews
from penstock.core.prompt import HashedPrompt
from penstock.core.types import BlockHash, Job, Request, RequestId
from penstock.engine.block_news import NewsDesk
from penstock.engine.ledger import BlockLedger
from penstock.engine.radix import RadixLedger
from penstock.policy.block_index import BlockIndex


def chain(*names: object) -> tuple[BlockHash, ...]:
    """Hashes of a prompt: each stands for itself and all before it."""
    return tuple(BlockHash(repr(names[: end + 1]).encode()) for end in range(len(names)))


def job_of(seq: int, hashes: Sequence[BlockHash]) -> Job:
    prompt = HashedPrompt(len(hashes) + 1, tuple(hashes), 1)
    return Job(
        seq=seq,
        request=Request(id=RequestId(f"r{seq}"), model="m", prompt=prompt),
        answer=0,
        arrived_at=0.0,
        hashes=list(hashes),
        num_prompt=len(hashes) + 1,
        max_tokens=1,
    )


def news(stored: Sequence[BlockHash] = (), removed: Sequence[BlockHash] = ()) -> BlockNews:
    return BlockNews(tuple(stored), tuple(removed))


def test_each_replica_matches_as_far_as_it_holds() -> None:
    index, prompt = BlockIndex(), chain(*range(100))
    index.tell("a", news(prompt[:100]))
    index.tell("b", news(prompt[:37]))
    index.tell("c", news(prompt[:37]))
    index.tell("d", news(chain(9, 9)))
    assert index.match(prompt) == {"a": 100, "b": 37, "c": 37}
    assert index.match(chain(*range(40), "other")) == {"a": 40, "b": 37, "c": 37}
    index.tell("a", news(removed=prompt[1:]))
    assert index.match(prompt) == {"a": 1, "b": 37, "c": 37}
    index.forget("b")
    assert index.match(prompt) == {"a": 1, "c": 37} and index.match(()) == {}
    index.tell("e", news(prompt[:2]))  # in the place of b
    assert index.match(prompt) == {"a": 1, "c": 37, "e": 2}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=6),
    st.lists(st.integers(0, 2), max_size=12),
)
def test_match_is_the_longest_common_beginning(held: list[list[int]], asked: list[int]) -> None:
    index = BlockIndex()
    for place, prompt in enumerate(held):
        index.tell(f"r{place}", news(chain(*prompt)))
    want = {}
    for place, prompt in enumerate(held):
        pairs = zip(prompt, asked, strict=False)
        same = next((n for n, (one, two) in enumerate(pairs) if one != two), None)
        same = min(len(prompt), len(asked)) if same is None else same
        if same:
            want[f"r{place}"] = same
    assert index.match(chain(*asked)) == want


def test_guesses_hold_until_their_time_and_news_make_them_certain() -> None:
    index, prompt = BlockIndex(ttl_s=10.0), chain(*range(8))
    index.guess(0.0, "a", prompt)
    assert index.match(prompt) == {"a": 8}
    index.tell("a", news(prompt[:5]))
    index.guess(5.0, "a", prompt)
    index.expire(10.0, "a")
    assert index.match(prompt) == {"a": 8}  # said again at 5 s
    index.expire(15.0, "a")
    assert index.match(prompt) == {"a": 5} and index.told("a") == set(prompt[:5])
    assert len(index) == 5


def test_a_foreign_server_is_taken_to_hold_so_many_blocks_and_no_more() -> None:
    index, first, second = BlockIndex(), chain(*range(6)), chain("x", "y", "z")
    index.guess(0.0, "a", first, most=8)
    index.guess(1.0, "a", second, most=8)
    assert index.match(first) == {"a": 5} and index.match(second) == {"a": 3}
    index.guess(2.0, "a", first[:2], most=8)
    index.guess(3.0, "a", chain("p", "q", "r", "s"), most=8)
    assert index.match(first) == {"a": 2}


@pytest.mark.parametrize("kind", [BlockLedger, RadixLedger])
@pytest.mark.parametrize("seed", range(4))
def test_news_of_a_ledger_are_its_contents(kind: type[BlockLedger], seed: int) -> None:
    """Random admissions, growth, preemption and eviction in too little memory; the index hears now and then."""
    chance, ledger, index = random.Random(seed), kind(24, 1), BlockIndex()
    ledger.news = NewsDesk()
    jobs: list[Job] = []
    for number in range(400):
        if chance.random() < 0.5 and len(jobs) < 4:
            prompt = [chance.randrange(2) for _ in range(chance.randrange(1, 9))]
            job = job_of(number, chain(*prompt))
            if len(prompt) + 1 <= ledger.free:
                job.computed = ledger.adopt(job)
                ledger.extend(job, job.num_prompt)
                ledger.register(job, job.num_prompt)
                job.computed = job.num_prompt
                jobs.append(job)
        elif jobs:
            job = jobs.pop(chance.randrange(len(jobs)))
            ledger.release(job, chance.choice([job.computed, job.computed // 2]))
        if chance.random() < 0.3:
            told = ledger.news.take()
            if told is not None:
                index.tell("a", told)
            assert index.told("a") == set(ledger.contents().values()) == ledger.news.contents()
            ledger.check()
