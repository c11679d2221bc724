"""Hash chains against real texts: equal ids if and only if the texts begin alike."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.core.prompt import TokenPrompt, TracedPrompt
from penstock.traffic.prefix import Chain, Level, Prefix, Prefixes

SIZE = 4
contents = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 11)), max_size=6)


def chain_of(content: list[tuple[str, int]]) -> Chain:
    chain = Chain(SIZE)
    for segment, tokens in content:
        chain = chain.extend(segment, tokens)
    return chain


def ids_of(content: list[tuple[str, int]]) -> list[int]:
    """The text itself, as if every segment were a text of 100 tokens that are nowhere else."""
    return [ord(segment) * 100 + place for segment, num in content for place in range(num)]


@settings(max_examples=200, deadline=None)
@given(contents, contents)
@example([("a", 8), ("a", 2), ("b", 2)], [("a", 10), ("b", 2)])
@example([("a", 2), ("b", 5)], [("c", 2), ("b", 5)])
def test_chains_share_the_blocks_that_texts_share_and_no_other(
    first: list[tuple[str, int]], second: list[tuple[str, int]]
) -> None:
    ours = chain_of(first), chain_of(second)
    texts = TokenPrompt(ids_of(first)).blocks(SIZE), TokenPrompt(ids_of(second)).blocks(SIZE)
    for chain, text in zip(ours, texts, strict=True):
        assert len(chain.ids) == len(text) == chain.num_tokens // SIZE
    shared = sum(a == b for a, b in zip(*texts, strict=False))
    named_alike = sum(a == b for a, b in zip(ours[0].ids, ours[1].ids, strict=False))
    # A text written in two ways (abc after ab, or b in one piece and in two) may be taken for two texts: sharing is
    # never made up, and is found wherever the segments are the same.
    assert named_alike <= shared
    same = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            same += min(one[1], other[1]) if one[0] == other[0] else 0
            break
        same += one[1]
    assert named_alike >= same // SIZE


@settings(max_examples=100, deadline=None)
@given(contents, contents)
def test_what_continues_extends_the_ids(
    first: list[tuple[str, int]], more: list[tuple[str, int]]
) -> None:
    short, long = chain_of(first), chain_of(first + more)
    assert long.ids[: len(short.ids)] == short.ids
    assert len(set(long.ids)) == len(long.ids)


def test_prompts_of_engines_with_smaller_blocks_share_them() -> None:
    chain = Chain(64).extend("system", 1000)
    first, second = chain.extend("one", 500), chain.extend("two", 70)
    ours = [TracedPrompt(each.num_tokens, each.ids, 64).blocks(16) for each in (first, second)]
    shared = sum(a == b for a, b in zip(*ours, strict=False))
    assert shared == 1000 // 64 * 4


def drawn(prefix: Prefix, num: int, num_prompt: int = 5000, tenant: str = "") -> list[Chain]:
    prefixes = Prefixes(prefix, seed=3, owner="test", where="prefix")
    return [prefixes.draw(num_prompt, tenant) for _ in range(num)]


def test_popularity_follows_zipf() -> None:
    found = Counter(chain.ids for chain in drawn(Prefix(number=5, tokens=640.0, zipf=1.0), 6000))
    weights = [1 / rank for rank in range(1, 6)]
    for count, weight in zip(sorted(found.values(), reverse=True), weights, strict=True):
        share = weight / sum(weights)
        assert abs(count - 6000 * share) < 4 * (6000 * share * (1 - share)) ** 0.5


def test_texts_of_a_level_have_lengths_of_their_own_and_keep_them() -> None:
    tokens = {"kind": "uniform", "low": 100, "high": 2000}
    found = drawn(Prefix(number=8, tokens=tokens, zipf=0.0), 400)  # type: ignore[arg-type]
    lengths = {chain.ids[0]: chain.num_tokens for chain in found}
    assert len(lengths) == 8 == len(set(lengths.values()))
    assert all(lengths[chain.ids[0]] == chain.num_tokens for chain in found)


def test_deeper_levels_make_a_tree() -> None:
    prefix = Prefix(number=2, tokens=128.0, deeper=(Level(number=3, tokens=128.0),))
    found = {chain.ids for chain in drawn(prefix, 500)}
    assert len(found) == 6 and len({ids[:2] for ids in found}) == 2


def test_tenants_share_only_when_told() -> None:
    for across, num in ((False, 2), (True, 1)):
        prefix = Prefix(tokens=128.0, across_tenants=across)
        assert len({drawn(prefix, 1, tenant=name)[0].ids for name in ("a", "b")}) == num


def test_a_prefix_within_leaves_the_caller_a_token() -> None:
    prefix = Prefix(number=3, tokens=640.0, deeper=(Level(tokens=640.0),))
    assert [chain.num_tokens for chain in drawn(prefix, 3, num_prompt=100)] == [99] * 3
    assert drawn(prefix, 1, num_prompt=1)[0].num_tokens == 0


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_only_a_share_begins_with_it(share: float) -> None:
    found = drawn(Prefix(tokens=640.0, share=share), 2000)
    assert abs(sum(bool(chain.ids) for chain in found) - 2000 * share) <= 4 * 19.4 * (share > 0)
