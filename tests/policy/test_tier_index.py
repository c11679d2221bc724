"""The index of device, host memory and disk says what each holds, whatever is told in whatever order."""

from __future__ import annotations

import random

import pytest

from penstock.core.messages import BlockNews, Changes
from penstock.core.types import BlockHash
from penstock.core.views import Behind
from penstock.policy.tier_index import TierIndex

PROMPT = tuple(BlockHash(bytes([place]) * 16) for place in range(30))


def test_a_prompt_is_found_in_three_places_one_behind_the_other() -> None:
    index = TierIndex(has_tiers=True)
    news = BlockNews(PROMPT[:10], (), Changes(PROMPT[10:16]), Changes(PROMPT[14:20]))
    index.tell("a", news)
    index.tell("b", BlockNews(PROMPT[:3]))
    assert index.behind(PROMPT) == {"a": Behind(6, 4)}
    assert index.match(PROMPT) == {"a": 10, "b": 3} and index.depth(PROMPT, "b") == 3
    assert index.match_near(PROMPT) == {"a": 16, "b": 3}
    assert index.told_near("a") == set(PROMPT[:16])
    index.tell("a", BlockNews((), PROMPT[6:10], Changes(PROMPT[6:10])))
    assert index.match(PROMPT)["a"] == 6 and index.behind(PROMPT) == {"a": Behind(10, 4)}
    index.tell("a", BlockNews(host=Changes((), PROMPT[12:16]), disk=Changes((), PROMPT[14:16])))
    assert index.match(PROMPT)["a"] == 6
    index.tell("a", BlockNews(disk=Changes((), PROMPT[16:20])))
    assert index.match(PROMPT)["a"] == 6 and index.behind(PROMPT) == {"a": Behind(6, 0)}
    index.guess(0.0, "b", PROMPT[:5])
    assert index.match(PROMPT)["b"] == 5 and "b" not in index.behind(PROMPT)
    index.forget("a")
    assert index.match(PROMPT) == {"b": 5} and not index.behind(PROMPT)


def test_a_guess_that_outlives_what_was_told_takes_nothing_from_what_lies_behind() -> None:
    index = TierIndex(has_tiers=True)
    index.tell("a", BlockNews((), (), Changes(PROMPT[:10]), Changes(PROMPT[:20])))
    index.guess(0.0, "a", PROMPT[:10])
    index.tell("a", BlockNews(host=Changes((), PROMPT[5:10])))
    assert index.match(PROMPT) == {"a": 10} and index.behind(PROMPT) == {"a": Behind(0, 10)}


def test_without_tiers_it_costs_one_index() -> None:
    index = TierIndex()
    index.tell("a", BlockNews(PROMPT[:4]))
    assert index.match(PROMPT) == index.match_near(PROMPT) == {"a": 4} and not index.behind(PROMPT)
    assert index.told_near("a") == set(PROMPT[:4]) and not index.told_near("nobody")


@pytest.mark.parametrize("seed", range(8))
def test_it_agrees_with_sets(seed: int) -> None:
    """Each place holds a piece of the prompt that begins where the nearer ones have not ended yet."""
    chance, index = random.Random(seed), TierIndex(has_tiers=True)
    held = {
        name: [set[BlockHash](), set[BlockHash](), set[BlockHash]()] for name in ("a", "b", "c")
    }
    wanted: dict[str, tuple[int, Behind]] = {}
    for _ in range(60):
        name = chance.choice(list(held))
        ends = sorted(chance.randint(0, len(PROMPT)) for _ in range(3))
        begins = [0, chance.randint(0, ends[0]), chance.randint(0, ends[1])]
        changes = []
        for place, begin, end in zip(held[name], begins, ends, strict=True):
            fresh = set(PROMPT[begin:end])
            changes.append(Changes(tuple(fresh - place), tuple(place - fresh)))
            place.clear()
            place |= fresh
        index.tell(name, BlockNews(*changes[0], *changes[1:]))
        device, host, disk = held[name]
        assert index.told(name) == device and index.told_behind(name) == (host, disk)
        wanted[name] = ends[0], Behind(ends[1] - ends[0], ends[2] - ends[1])
        here, behind = index.match(PROMPT), index.behind(PROMPT)
        assert wanted == {name: (here.get(name, 0), behind.get(name, Behind())) for name in wanted}
        assert all(any(each) for each in behind.values())
