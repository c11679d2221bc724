"""Routes: turns, shortest queues, two random choices, remembered prefixes."""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from penstock.core.prompt import HashedPrompt
from penstock.core.types import BlockHash, Report, Request, RequestId, Stage
from penstock.policy import find, route
from penstock.policy.route.by_stage import ByStage
from penstock.policy.route.prefix import Prefix

SIZE = 16


def reports_of(names: Sequence[str], **fields: Any) -> list[Report]:
    return [Report(replica=name, at=0.0, block_size=SIZE, **fields) for name in names]


def request_of(blocks: Sequence[bytes] = (), num_tokens: int | None = None) -> Request:
    hashes = tuple(BlockHash(block) for block in blocks)
    tokens = num_tokens or max(1, len(blocks) * SIZE)
    return Request(id=RequestId("r"), model="m", prompt=HashedPrompt(tokens, hashes, SIZE))


def ask(
    policy: Any,
    reports: Sequence[Report],
    *,
    request: Request | None = None,
    outstanding: Mapping[str, int] | None = None,
    stage: Stage = "prefill",
    rng: random.Random | None = None,
) -> str | None:
    view = route.View(
        0.0, rng or random.Random(0), request or request_of(), stage, reports, outstanding or {}
    )
    decision = policy.decide(view)
    route.law(view, decision)
    return decision.replica  # type: ignore[no-any-return]


def test_two_policies_choose_for_prompts_and_for_answers() -> None:
    policy, three = (
        ByStage(find("route", "round-robin")(), find("route", "least")()),
        reports_of("abc"),
    )
    loads = {"a": 4, "b": 4, "c": 1}
    asked: list[Stage] = ["prefill", "decode", "prefill", "decode"]
    assert [ask(policy, three, stage=each, outstanding=loads) for each in asked] == list("acbc")
    hears = find("route", "dualmap")()
    assert ByStage(hears, policy).observe == hears.observe and policy.observe is None


def test_round_robin_is_fair_whoever_comes_and_goes() -> None:
    policy, three = find("route", "round-robin")(), reports_of("abc")
    assert [ask(policy, three) for _ in range(5)] == list("abcab")
    assert [ask(policy, reports_of("acd")) for _ in range(4)] == list("cdac")
    assert ask(policy, three, stage="decode") == "a"  # a turn of its own
    assert ask(policy, reports_of("abc", is_draining=True)) is None


def test_least_outstanding_then_reported_then_in_turn() -> None:
    policy = find("route", "least")()
    three = reports_of("abc")
    assert ask(policy, three, outstanding={"a": 3, "b": 1, "c": 2}) == "b"
    assert [ask(policy, three, outstanding={"a": 3}) for _ in range(4)] == list("cbcb")
    told = [*reports_of("a", num_waiting=2), *reports_of("b", num_running=1)]
    assert ask(policy, told) == "b"


def test_two_choices_take_the_better_and_never_the_worst_of_all() -> None:
    policy, rng = find("route", "p2c")(), random.Random(1)
    counts = Counter(
        ask(policy, reports_of("abcd"), outstanding={"a": 9, "b": 3, "c": 1}, rng=rng)
        for _ in range(6000)
    )
    assert counts["a"] == 0
    # of six pairs d wins three, c two, b one
    for name, share in (("d", 3 / 6), ("c", 2 / 6), ("b", 1 / 6)):
        assert counts[name] / 6000 == pytest.approx(share, abs=0.03)
    assert ask(policy, reports_of("a")) == "a"


def test_two_choices_keep_the_fullest_near_the_mean() -> None:
    """Balls into bins. m = n: ln ln n / ln 2 + O(1) against ln n / ln ln n. m = 20 n: the same gap above the mean
    against about sqrt(2 (m / n) ln n) (Azar et al. 1999; Berenbrink et al. 2000)."""
    num = 300
    names = [f"r{place:03}" for place in range(num)]
    reports, policy, rng = reports_of(names), find("route", "p2c")(), random.Random(4)
    loads, chance = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for ball in range(1, 20 * num + 1):
        chosen = ask(policy, reports, outstanding=loads, rng=rng)
        assert chosen is not None
        loads[chosen] += 1
        chance[names[rng.randrange(num)]] += 1
        if ball == num:
            assert max(loads.values()) <= math.log(math.log(num)) / math.log(2) + 2
            assert max(chance.values()) > max(loads.values())
    gap, gap_of_chance = max(loads.values()) - 20, max(chance.values()) - 20
    assert gap <= math.log(math.log(num)) / math.log(2) + 1
    assert gap_of_chance > math.sqrt(2 * 20 * math.log(num)) / 2
    assert gap_of_chance > 3 * gap


def test_prefix_goes_where_it_was_seen() -> None:
    policy, three = Prefix(), reports_of("abc")
    first, second = request_of([b"1", b"2", b"3", b"4"]), request_of([b"5", b"6"])
    one = ask(policy, three, request=first)
    other = ask(policy, three, request=second)
    assert one != other  # nothing known: the smallest memory
    for _ in range(5):
        assert ask(policy, three, request=first) == one
        assert ask(policy, three, request=second) == other
    longer = request_of([b"1", b"2", b"3", b"4", b"7", b"8", b"9"])
    assert ask(policy, three, request=longer) == one  # 4 of 7 blocks


def test_prefix_needs_more_than_its_threshold() -> None:
    policy, three = Prefix(threshold=0.5), reports_of("abc")
    assert ask(policy, three, request=request_of([b"1", b"2"])) == "a"
    half = request_of([b"1", b"2", b"8", b"9"])
    assert ask(policy, three, request=half) == "b"
    assert ask(Prefix(threshold=0.5), three, request=half) == "a"
    policy = Prefix(threshold=0.4)
    ask(policy, three, request=request_of([b"1", b"2"]))
    assert ask(policy, three, request=half) == "a"


def test_prefix_prefers_the_longest_match() -> None:
    policy, three = Prefix(threshold=0.1), reports_of("abc")
    short, long = request_of([b"1", b"2"]), request_of([b"1", b"2", b"3", b"4"])
    ask(policy, [*reports_of("ab", is_draining=True), *reports_of("c")], request=long)
    ask(policy, [*reports_of("ac", is_draining=True), *reports_of("b")], request=short)
    assert ask(policy, three, request=request_of([b"1", b"2", b"3", b"9"])) == "c"


def test_prefix_balances_only_beyond_both_bounds() -> None:
    two, prompt = reports_of("ab"), request_of([b"1", b"2"])
    for loads, chosen in (
        ({"a": 32, "b": 0}, "a"),  # the difference does not exceed 32
        ({"a": 33, "b": 0}, "b"),
        ({"a": 440, "b": 400}, "a"),  # 440 does not exceed 1.1 * 400
        ({"a": 441, "b": 400}, "b"),
    ):
        policy = Prefix()
        assert ask(policy, two, request=prompt) == "a"
        assert ask(policy, two, request=prompt, outstanding=loads) == chosen
    policy = Prefix()
    ask(policy, two, request=prompt)
    ask(policy, two, request=prompt, outstanding={"a": 33})
    assert (
        ask(policy, two, request=prompt, outstanding={"a": 5}) == "b"
    )  # b remembers it too by now


def test_prefix_memory_is_bounded_and_loses_leaves_first() -> None:
    policy, one = Prefix(max_blocks=4), reports_of("a")
    ask(policy, one, request=request_of([b"1", b"2", b"3"]))
    ask(policy, one, request=request_of([b"8", b"9"]))
    assert policy._known.guessed("a") == [b"2", b"1", b"9", b"8"]


def test_prefix_forgets_dead_replicas() -> None:
    policy, two, prompt = Prefix(), reports_of("ab"), request_of([b"1", b"2"])
    assert ask(policy, two, request=prompt) == "a"
    assert ask(
        policy, reports_of("a", is_alive=False) + reports_of("b"), request=request_of([b"9"])
    )
    ask(policy, two, request=request_of([b"3", b"4"]))  # a is back, and empty
    assert ask(policy, two, request=request_of([b"9"])) == "b"
    assert b"1" not in policy._known.guessed("a")


def test_prompts_without_hashes_go_to_the_shortest_queue() -> None:
    policy = Prefix()
    got = [ask(policy, reports_of("abc"), outstanding={"b": 2}) for _ in range(4)]
    assert Counter(got) == {"a": 2, "c": 2}


def play(name: str, seed: int, **parameters: Any) -> tuple[float, float]:
    """(share of blocks found in a replica's cache, requests of the busiest replica over the mean)

    8 replicas with room for 6 prefixes each; 40 prefixes of 32 blocks, popular like 1 / rank^0.7; each request adds
    4 blocks of its own and is outstanding while the next 40 arrive.
    """
    rng, policy = random.Random(seed), find("route", name)(**parameters)
    names = [f"r{place}" for place in range(8)]
    reports, loads = reports_of(names), dict.fromkeys(names, 0)
    caches: dict[str, OrderedDict[bytes, None]] = {name: OrderedDict() for name in names}
    weights = [1 / (rank + 1) ** 0.7 for rank in range(40)]
    served: Counter[str] = Counter()
    going: list[str] = []
    hits = total = 0
    for number, prefix in enumerate(rng.choices(range(40), weights, k=1500)):
        blocks = [b"%d-%d" % (prefix, place) for place in range(32)]
        blocks += [b"own-%d-%d" % (number, place) for place in range(4)]
        chosen = ask(policy, reports, request=request_of(blocks), outstanding=loads, rng=rng)
        assert chosen is not None
        cache = caches[chosen]
        hits += next((place for place, b in enumerate(blocks) if b not in cache), len(blocks))
        total += len(blocks)
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > 6 * 36:
            cache.popitem(last=False)
        served[chosen] += 1
        loads[chosen] += 1
        going.append(chosen)
        if len(going) > 40:
            loads[going.pop(0)] -= 1
    return hits / total, max(served.values()) / (1500 / 8)


def test_prefix_routing_finds_more_than_round_robin_at_bounded_imbalance() -> None:
    for seed in (1, 2):
        found_by_turns, _ = play("round-robin", seed)
        found, busiest = play("prefix", seed, balance_abs=4, balance_rel=1.2)
        assert found > 1.5 * found_by_turns
        assert busiest < 1.5


def test_prefix_imbalance_is_bounded_for_one_hot_prompt() -> None:
    """Nothing ends: at any instant the queues differ by one more than allowed, or the ratio by one request."""
    policy, names = Prefix(balance_abs=4, balance_rel=1.2), "abcd"
    loads = dict.fromkeys(names, 0)
    for _ in range(200):
        chosen = ask(policy, reports_of(names), request=request_of([b"1", b"2"]), outstanding=loads)
        assert chosen is not None
        loads[chosen] += 1
        most, least = max(loads.values()), min(loads.values())
        assert most - least <= 5 or most <= 1.2 * least + 1
    assert least > 0
