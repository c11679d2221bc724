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
    found = index.match(chain(*asked))
    assert found == want and index.match(chain(*asked)) == want, "asked twice, told the same"
    depths = {f"r{place}": index.depth(chain(*asked), f"r{place}") for place in range(len(held))}
    assert {name: num for name, num in depths.items() if num} == want
    assert index.depth(chain(*asked), "nobody") == 0


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
    assert index.guessed("a") == []
    index.check()


def test_a_foreign_server_is_taken_to_hold_so_many_blocks_and_no_more() -> None:
    index, first, second = BlockIndex(), chain(*range(6)), chain("x", "y", "z")
    index.guess(0.0, "a", first, most=8)
    index.guess(1.0, "a", second, most=8)
    assert index.match(first) == {"a": 5} and index.match(second) == {"a": 3}
    index.guess(2.0, "a", first[:2], most=8)
    index.guess(3.0, "a", chain("p", "q", "r", "s"), most=8)
    assert index.match(first) == {"a": 2}


class Held:
    """What an index is to say, by single blocks: sets, and for guesses until when."""

    def __init__(self, names: str) -> None:
        self.told = {name: set[BlockHash]() for name in names}
        self.guessed = {name: dict[BlockHash, float]() for name in names}
        self.parents = dict[BlockHash, BlockHash]()

    def guess(self, now: float, name: str, prompt: Sequence[BlockHash], most: int | None) -> None:
        guessed = self.guessed[name]
        for each in reversed(prompt):
            if each not in self.told[name]:
                guessed.pop(each, None)
                guessed[each] = now + 20.0
        for each in list(guessed)[: -most or None] if most else ():
            del guessed[each]

    def store(self, name: str, prompt: Sequence[BlockHash]) -> tuple[BlockHash, ...]:
        fresh = tuple(each for each in prompt if each not in self.told[name])
        self.told[name].update(fresh)
        for each in fresh:
            self.guessed[name].pop(each, None)
        return fresh

    def remove(self, name: str) -> tuple[BlockHash, ...]:
        """One that nothing continues."""
        held = self.told[name] | self.guessed[name].keys()
        inner = {self.parents.get(each) for each in held}
        ends = sorted(self.told[name] - inner)[:1]
        self.told[name].difference_update(ends)
        return tuple(ends)

    def expire(self, now: float, name: str) -> None:
        left = [(each, until) for each, until in self.guessed[name].items() if until > now]
        self.guessed[name] = dict(left)

    def match(self, prompt: Sequence[BlockHash]) -> dict[str, int]:
        found = {}
        for name in self.told:
            held = self.told[name] | self.guessed[name].keys()
            num = next((at for at, each in enumerate(prompt) if each not in held), len(prompt))
            if num:
                found[name] = num
        return found


@pytest.mark.parametrize("most", [None, 1, 7])
@pytest.mark.parametrize("seed", range(6))
def test_it_says_what_sets_of_single_blocks_say(seed: int, most: int | None) -> None:
    chance, index, held, now = random.Random(seed), BlockIndex(ttl_s=20.0), Held("abcd"), 0.0
    for _ in range(600):
        now, name = now + chance.random(), chance.choice("abcd")
        prompt = chain(*(chance.randrange(2) for _ in range(chance.randrange(12))))
        held.parents.update(zip(prompt[1:], prompt, strict=False))
        what = chance.random()
        if what < 0.5:
            index.guess(now, name, prompt, most)
            held.guess(now, name, prompt, most)
        elif what < 0.8:
            index.tell(name, news(held.store(name, prompt)))
        else:
            index.tell(name, news((), held.remove(name)))
        index.expire(now, name)
        held.expire(now, name)
        index.check()
        assert index.told(name) == held.told[name]
        assert index.guessed(name) == list(held.guessed[name])
        assert index.size(name) == len(held.told[name]) + len(held.guessed[name])
        found = index.match(prompt)
        assert found == held.match(prompt)
        assert found == {each: num for each in "abcd" if (num := index.depth(prompt, each))}
        if what > 0.99:
            index.forget(name)
            held.told[name].clear()
            held.guessed[name].clear()


@pytest.mark.parametrize("seed", range(6))
def test_news_in_any_order_break_nothing(seed: int) -> None:
    """Blocks that come without those before them, and go from under those behind them."""
    chance, index, now = random.Random(seed), BlockIndex(ttl_s=5.0), 0.0
    for _ in range(600):
        now, name = now + chance.random(), chance.choice("abc")
        prompt = chain(*(chance.randrange(2) for _ in range(chance.randrange(1, 12))))
        if chance.random() < 0.5:
            index.guess(now, name, prompt, chance.choice((None, 9)))
        else:
            stored = chance.sample(prompt, chance.randint(0, len(prompt)))
            removed = chance.sample(prompt, chance.randint(0, len(prompt)))
            index.tell(name, news(stored, removed))
        index.expire(now, name)
        index.check()
    for name in "abc":
        index.forget(name)
    index.check()
    assert not index.match(prompt)


def test_a_talk_that_grows_stays_one_run() -> None:
    index, talk = BlockIndex(), chain(*range(200))
    for end in range(10, 201, 10):
        index.guess(0.0, "a", talk[:end])
    (owner,) = index._replicas.values()
    assert len(owner.noted) == 1 and owner.num == 200 and index.match(talk) == {"a": 200}


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
