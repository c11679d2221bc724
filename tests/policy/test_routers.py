"""Each router's own rule, on cases worked by hand; and the ring and the hot beginnings that some of them stand on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from penstock.core.events import Begun
from penstock.core.messages import BlockNews, Changes
from penstock.core.prompt import HashedPrompt
from penstock.core.types import BlockHash, ProgramId, Report, Request, RequestId, Slo
from penstock.core.views import Move
from penstock.cost.phases import Phases
from penstock.policy import TABLE, find, route
from penstock.policy.block_index import BlockIndex
from penstock.policy.loads import NOTHING_SENT, Sent
from penstock.policy.route import Decision, Queued
from penstock.policy.route.hotness import Hotness
from penstock.policy.route.ring import Ring, place_of
from penstock.policy.tier_index import TierIndex

SIZE = 10
PER_TOKEN = Phases(prefill=(0.0, 0.001, 0.0), decode=(0.01, 0.0, 0.0))  # a millisecond a token


def chain(*names: object) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(repr(names[: end + 1]).encode()) for end in range(len(names)))


def request_of(*names: object, tokens: int | None = None, name: str = "r", **more: Any) -> Request:
    hashes = chain(*names)
    prompt = HashedPrompt(tokens or max(1, len(names) * SIZE + 1), hashes, SIZE)
    return Request(id=RequestId(name), model="m", prompt=prompt, **more)


def fleet(**waiting: int) -> list[Report]:
    """Replicas by name, with so many prompt tokens waiting."""
    return [
        Report(replica=name, at=0.0, block_size=SIZE, total_blocks=100, free_blocks=100, waiting_tokens=tokens)
        for name, tokens in waiting.items()
    ]  # fmt: skip


def ask(
    policy: Any,
    reports: Sequence[Report],
    request: Request,
    *,
    held: Mapping[str, Sequence[BlockHash]] | None = None,
    **more: Any,
) -> Decision:
    index = BlockIndex()
    for name, hashes in (held or {}).items():
        index.tell(name, BlockNews(tuple(hashes)))
    facts: dict[str, Any] = {
        "outstanding": {},
        "blocks": index,
        "cost": PER_TOKEN,
        "token_s": 0.001,
    }
    facts |= more
    view = route.View(
        now=facts.pop("now", 100.0), rng=random.Random(0), request=request, stage="prefill",
        reports=reports, **facts,
    )  # fmt: skip
    decision = policy.decide(view)
    route.law(view, decision)
    assert isinstance(decision, Decision)
    return decision


PROMPT_OF_TEN = request_of(*range(10), tokens=10 * SIZE)


def made(name: str, **parameters: Any) -> Any:
    return find("route", name)(**parameters)


# -------------------------------------------------------------------------------- ring and hotness


def test_only_neighbours_keys_move_on_a_ring() -> None:
    ring, keys = Ring(), [place_of(b"%d" % number) for number in range(4000)]
    names = [f"r{number}" for number in range(8)]
    ring.keep(names)
    before = {key: ring.owner(key) for key in keys}
    shares = Counter(before.values())
    assert max(shares.values()) < 1.5 * 4000 / 8 and min(shares.values()) > 4000 / 8 / 1.6
    ring.keep([*names, "new"])
    moved = {key for key in keys if ring.owner(key) != before[key]}
    assert all(ring.owner(key) == "new" for key in moved)
    assert 0.5 / 9 < len(moved) / 4000 < 1.6 / 9
    ring.keep([name for name in names if name != "r3"])
    assert all(ring.owner(key) == old for key, old in before.items() if old != "r3")
    for key in keys[:50]:
        around = list(ring.after(key))
        assert around[0] == ring.owner(key) and sorted(around) == sorted(set(names) - {"r3"})


def test_a_hot_beginning_is_split_and_joined_again_in_a_band() -> None:
    hot = Hotness(window=100, least=20, unit_tokens=SIZE)

    def see(*names: object) -> int:
        units = hot.units(chain(*names), SIZE)
        hot.see(units, 4)
        return hot.depth(units)

    for number in range(40):
        depth = see("system", number % 2, number)
    # all begin with "system" (1 > 2/4): split; the halves (1/2) are not above 2/4
    assert depth == 2
    for number in range(60):
        see(f"other-{number}", number)
    assert see("system", 0, "x") == 2  # 0.4 of the window: between 1/4 and 2/4, as it was
    for number in range(20):
        see(f"more-{number}", number)
    assert see("system", 0, "y") == 1  # below 1/4
    assert hot.units(chain(*range(3)), 30) == chain(*range(3))  # blocks longer than a unit
    assert hot.units((), SIZE) == ()


# -------------------------------------------------------------------------------- baselines


def test_prefix_hash_is_the_owner_unless_it_is_above_the_bound() -> None:
    policy, names = made("prefix-hash", prefix_tokens=20), "abcd"
    reports = fleet(**dict.fromkeys(names, 0))
    first = ask(policy, reports, request_of("s", "t", 1)).replica
    assert first == ask(policy, reports, request_of("s", "t", 2)).replica
    assert first is not None
    loads = dict.fromkeys(names, 4) | {first: 5}
    # (17 + 1) / 4 * 1.25 = 5.6: five may be taken; six of 19 + 1: 6.25, seven of 20: 6.25 no
    assert ask(policy, reports, request_of("s", "t", 3), outstanding=loads).replica == first
    loads[first] = 7
    other = ask(policy, reports, request_of("s", "t", 3), outstanding=loads).replica
    assert other != first
    assert len({ask(policy, reports, request_of(n, "t")).replica for n in range(40)}) == 4


def test_a_session_stays_and_others_go_by_rate() -> None:
    policy, reports = made("session", window_s=10.0), fleet(a=0, b=0, c=0)
    homes = {
        ask(policy, reports, request_of(n, program=ProgramId("talk"))).replica for n in range(9)
    }
    assert len(homes) == 1
    (home,) = homes
    got = [ask(policy, reports, request_of(n)).replica for n in range(4)]
    assert home not in got and Counter(got) == Counter({name: 2 for name in "abc" if name != home})
    assert home in [ask(policy, reports, request_of(n), now=120.0).replica for n in range(3)]


def test_the_deepest_match_takes_it_else_the_lowest_rate() -> None:
    policy, reports = made("deepest-prefix"), fleet(a=0, b=0)
    one = ask(policy, reports, request_of(1, 2, 3)).replica
    assert ask(policy, reports, request_of(1, 2, 4)).replica == one
    other = ask(policy, reports, request_of(7)).replica  # one has had two
    assert other != one
    assert ask(policy, reports, request_of(7, 8)).replica == other
    assert ask(made("deepest-prefix", min_tokens=50), reports, request_of(1)).why.startswith(
        "nothing"
    )


def test_kv_aware_goes_by_the_match_only_where_little_is_missing() -> None:
    policy, reports = made("kv-aware", missing_tokens=15), fleet(a=0, b=9999)
    held = {"b": chain(1, 2, 3)}
    assert ask(policy, reports, request_of(1, 2, 3, 4), held=held).replica == "b"  # 30 of 41
    assert ask(policy, reports, request_of(1, 2, 3, 4, 5), held=held).replica == "a"  # 30 of 51
    assert ask(policy, reports, request_of(9, 9), held=held).replica == "b"  # its turn by rate


def test_llm_d_adds_weighted_scores_and_breaks_affinity_for_a_long_wait() -> None:
    reports, held = fleet(a=0, b=0), {"a": chain(1, 2, 3, 4)}
    for report in reports:
        report.num_waiting = 64 if report.replica == "a" else 0
    sums = made("llm-d", keep_match=None)
    # a: 2 * 4/5 + 0.5 * (1 - 64/128) = 1.85; b: 0.5
    assert ask(sums, reports, request_of(1, 2, 3, 4, 5), held=held).why.startswith("score 1.850")
    # a: 2 * 0 + 0.25, b: 0.5
    assert ask(sums, reports, request_of(8, 9), held=held).replica == "b"
    filtering = made("llm-d", prefix=0.0, explore=0.0, break_s=5.0)
    assert ask(filtering, reports, request_of(1, 2, 3, 4), held=held).replica == "a"
    reports[0].waiting_tokens = 6000  # 6 s of queue
    assert ask(filtering, reports, request_of(1, 2, 3, 4), held=held).replica == "b"


def test_dynamo_counts_blocks() -> None:
    reports, held = fleet(a=100, b=40), {"a": chain(1, 2, 3, 4, 5)}
    request = request_of(1, 2, 3, 4, 5, 6, 7, 8, tokens=80)
    # a: 10 + 8 - 5 + 8 = 21; b: 4 + 8 + 8 = 20
    assert ask(made("dynamo"), reports, request, held=held).why == "cost 20.0 blocks"
    # a: 18 - 10 + 8 = 16
    assert ask(made("dynamo", overlap_weight=2.0), reports, request, held=held).replica == "a"
    # the hit is worth 1 / (1 + 8 * 6 / 8) = 1/7 of it behind six blocks of queue: 18 - 10/7 + 8
    decayed = made("dynamo", overlap_weight=2.0, queue_decay=8.0)
    assert ask(decayed, reports, request, held=held).replica == "b"
    reports[1].decode_tokens = 200
    assert ask(made("dynamo"), reports, request, held=held).replica == "a"
    drawn = made("dynamo", temperature=1.0)
    assert {ask(drawn, fleet(a=0, b=0), request).replica for _ in range(9)} <= {"a", "b"}


def test_mooncake_takes_the_earliest_first_token_and_refuses_early() -> None:
    held = {"a": chain(*range(40))}  # 400 tokens
    request = request_of(*range(60), tokens=600)
    for queue, chosen in ((390, "a"), (410, "b")):  # a: queue + 0.2 s, b: 0.6 s
        assert ask(made("mooncake"), fleet(a=queue, b=0), request, held=held).replica == chosen
    fetching = made("mooncake", replicates=True, transfer_s=1e-4)
    # b fetches 400 tokens in 0.04 s, and computes 200
    assert ask(fetching, fleet(a=100, b=0), request, held=held).why == "first token in 0.24 s"
    sent = {"a": Sent(1, 500, 5), "b": NOTHING_SENT}
    assert ask(made("mooncake"), fleet(a=0, b=0), request, held=held, sent=sent).replica == "b"
    strict = made("mooncake", refuse_above=1.0, slo_s=0.5)
    assert ask(strict, fleet(a=9000, b=9000), request, held=held).replica is None
    ages = {"a": 8.9}  # it worked for 8.9 of its 9 seconds since
    assert ask(strict, fleet(a=9000, b=9000), request, held=held, ages=ages).replica == "a"


def test_preble_exploits_long_hits_and_explores_otherwise() -> None:
    policy, request = made("preble"), request_of(*range(10), tokens=100)
    assert ask(policy, fleet(a=40, b=0), request, held={"a": chain(*range(6))}).replica == "a"
    assert ask(policy, fleet(a=90, b=0), request, held={"a": chain(*range(5))}).replica == "b"
    # 0.3 s of queue and 0.04 s of work at the holder, 0.1 s at the other: above three times
    assert ask(policy, fleet(a=300, b=0), request, held={"a": chain(*range(6))}).replica == "b"
    never = made("preble", balance=None)
    assert ask(never, fleet(a=300, b=0), request, held={"a": chain(*range(6))}).replica == "a"


def test_ray_prefix_draws_two_among_those_that_know_and_ranks_the_others() -> None:
    policy, reports = made("ray-prefix"), fleet(a=0, b=0, c=0)
    one = ask(policy, reports, request_of(1, 2, 3)).replica
    assert ask(policy, reports, request_of(1, 2, 9), outstanding={one: 50}).replica == one
    decision = ask(policy, reports, request_of(1, 2, 8))
    assert decision.replica == one and set(decision.alternates) == {"a", "b", "c"} - {one}
    balanced = made("ray-prefix", imbalanced_threshold=4)
    home = ask(balanced, reports, request_of(1, 2, 3)).replica
    others = {
        ask(balanced, reports, request_of(1, 2, n), outstanding={home: 50}).replica
        for n in range(9)
    }
    assert home not in others


def test_affinity_and_least_tokens_are_the_two_ends() -> None:
    reports, held = fleet(a=5000, b=0), {"a": chain(1)}
    assert ask(made("affinity"), reports, request_of(1, 2), held=held).replica == "a"
    assert ask(made("affinity"), reports, request_of(3), held=held).replica == "b"
    assert ask(made("least-tokens"), reports, request_of(1, 2), held=held).replica == "b"
    reports[0].cached_tokens, reports[1].prefill_tokens = 5000, 1
    assert ask(made("least-tokens"), reports, request_of(1, 2)).replica == "a"


# -------------------------------------------------------------------------------- DualMap


def pair_of(policy: Any, reports: Sequence[Report], *names: object) -> tuple[str, str]:
    decision = ask(policy, reports, request_of(*names))
    assert decision.replica is not None
    return decision.replica, decision.alternates[0]


def test_dualmap_keeps_two_homes_and_prefers_the_warm_one_within_the_promise() -> None:
    names = dict.fromkeys("abcdefgh", 0)
    one, two = pair_of(made("dualmap"), fleet(**names), "p")
    policy, prompt = made("dualmap", slo_s=5.0), request_of("p", tokens=100)
    for waiting in (names, names | {one: 70}, names | {two: 70}):
        assert ask(policy, fleet(**waiting), prompt).replica in (one, two)
    held = {one: chain("p")}
    assert ask(policy, fleet(**names | {one: 4000}), prompt, held=held).replica == one
    late = ask(policy, fleet(**names | {one: 5000, two: 4000}), prompt, held=held)
    assert late.replica == two and "lighter" in late.why
    promised = request_of("p", tokens=100, slo=Slo(ttft_s=1.0))
    assert ask(policy, fleet(**names | {one: 4000}), promised, held=held).replica == two
    first = made("dualmap", select="ttft")
    assert ask(first, fleet(**names | {one: 200}), prompt, held=held).replica == two
    assert ask(policy, fleet(only=0), prompt).replica == "only"


def test_dualmap_moves_requests_that_wait_only_to_their_other_home_and_only_if_they_gain() -> None:
    """Both homes are late. Of two that wait at the chosen one, one's other home is idle and one's is not."""
    names = dict.fromkeys("abcdefgh", 0)
    policy = made("dualmap", slo_s=1.0, guard_s=None)
    homes = {number: pair_of(made("dualmap"), fleet(**names), number) for number in range(200)}
    hot, cold = homes[0]
    idle = next(n for n, pair in homes.items() if hot in pair and cold not in pair)
    stuck = next(n for n, pair in homes.items() if n and set(pair) == {hot, cold})
    (target,) = set(homes[idle]) - {hot}
    waits = [(stuck, "stuck"), (idle, "idle")]
    queue = {
        name: Queued(request_of(number, tokens=800, name=name), hot, 800, 0, 100.0)
        for number, name in waits
    }
    busy = fleet(**names | {hot: 1600, cold: 1700})
    decision = ask(policy, busy, request_of(0, tokens=100), queued={hot: queue})
    assert decision.replica == hot
    assert decision.moves == (Move(RequestId("idle"), hot, target, "queued"),)
    calm = made("dualmap", slo_s=1.0, rebalances=False)
    assert not ask(calm, busy, request_of(0, tokens=100), queued={hot: queue}).moves
    assert not ask(policy, fleet(**names), request_of(0), queued={hot: queue}).moves


def plain_moves(
    queue: Sequence[Queued], others: Mapping[str, str], tokens: dict[str, int], slo_ms: int
) -> list[Move]:
    """Rebalancing as the text says it, all anew for each move: a millisecond a token, all sent a moment ago."""
    left, moves = list(queue), list[Move]()
    while True:
        waits = [sum(each.tokens for each in left[: end + 1]) for end in range(len(left))]
        there = [tokens[others[each.request.id]] + each.tokens for each in left]
        gains = [
            (wait - other, -place)
            for place, (wait, other) in enumerate(zip(waits, there, strict=True))
            if other <= slo_ms and other < wait
        ]
        if not gains or max(waits) <= slo_ms:
            return moves
        moved = left.pop(-max(gains)[1])
        target = others[moved.request.id]
        tokens[target] += moved.tokens
        moves.append(Move(moved.request.id, moved.replica, target, "queued"))


@pytest.mark.parametrize("seed", range(6))
def test_dualmap_moves_the_greatest_winner_again_and_again(seed: int) -> None:
    chance, names = random.Random(seed), dict.fromkeys("abcdefgh", 0)
    homes = {number: pair_of(made("dualmap"), fleet(**names), number) for number in range(80)}
    hot, cold = homes[0]
    queue, others = dict[str, Queued](), dict[str, str]()
    for number, pair in homes.items():
        if number and hot in pair:
            name, tokens = f"q{number}", chance.randrange(1, 16) * 64
            request = request_of(number, tokens=tokens, name=name)
            queue[name] = Queued(request, hot, tokens, 0, 100.0)
            others[name] = pair[pair[0] == hot]
    waiting = {name: chance.randrange(16) * 128 for name in names} | {hot: 8000, cold: 9000}
    want = plain_moves(list(queue.values()), others, dict(waiting), 4000)
    policy = made("dualmap", slo_s=4.0, guard_s=None, most_moves=len(queue))
    decision = ask(policy, fleet(**waiting), request_of(0, tokens=64), queued={hot: queue})
    assert decision.moves == tuple(want) and len(want) > 2


def test_dualmap_avoids_a_replica_that_lets_no_prompt_in() -> None:
    names = dict.fromkeys("abcdefgh", 0)
    policy = made("dualmap", slo_s=5.0, guard_s=3.0)
    one, two = pair_of(policy, fleet(**names), "p")
    queue = {"w": Queued(request_of("w", tokens=100, name="w"), one, 100, 0, 90.0)}
    held, prompt = {one: chain("p")}, request_of("p", tokens=100)
    assert ask(policy, fleet(**names), prompt, held=held, queued={one: queue}).replica == two
    policy.observe(Begun(at=99.0, who="fleet", request="v", replica=one))
    assert ask(policy, fleet(**names), prompt, held=held, queued={one: queue}).replica == one


@pytest.mark.parametrize("name", sorted(TABLE["route"]))
def test_every_router_spreads_what_shares_nothing(name: str) -> None:
    """400 prompts without hashes over four replicas, none ending: nobody has more than twice the mean."""
    policy, loads = made(name), dict.fromkeys("abcd", 0)
    for number in range(400):
        reports = fleet(**{key: 10 * count for key, count in loads.items()})
        chosen = ask(
            policy, reports, request_of(tokens=10, name=f"r{number}"), outstanding=loads
        ).replica
        assert chosen is not None
        loads[chosen] += 1
    assert max(loads.values()) <= 200


# -------------------------------------------------------------------------------- memory behind the device's


def in_tiers(**held: tuple[int, int, int]) -> TierIndex:
    """Blocks of PROMPT_OF_TEN on the device, behind them in host memory, behind those on disk."""
    index = TierIndex(has_tiers=True)
    hashes = PROMPT_OF_TEN.prompt.blocks(SIZE)
    for name, (device, host, disk) in held.items():
        near, far = device + host, device + host + disk
        told = Changes(hashes[device:near]), Changes(hashes[near:far])
        index.tell(name, BlockNews(hashes[:device], (), *told))
    return index


def test_xllm_adds_shares_of_prompt_memory_and_queue() -> None:
    reports = fleet(a=0, b=0, c=0)
    blocks = in_tiers(a=(4, 0, 0), b=(0, 6, 0), c=(0, 0, 10))
    told = ask(made("xllm-cache"), reports, PROMPT_OF_TEN, blocks=blocks)
    assert (told.replica, told.why) == ("b", "score 0.450"), "4, 4.5 and 2.5 of 10"
    told = ask(made("xllm-cache", host=0.5), reports, PROMPT_OF_TEN, blocks=blocks)
    assert (told.replica, told.why) == ("a", "score 0.400")
    reports[1].free_blocks = 90  # a tenth of the memory of b is in use
    assert ask(made("xllm-cache"), reports, PROMPT_OF_TEN, blocks=blocks).replica == "a"
    reports[0].num_waiting, reports[2].num_waiting = 2, 1
    told = ask(made("xllm-cache"), reports, PROMPT_OF_TEN, blocks=blocks)
    assert (told.replica, told.why) == ("b", "score 0.350"), "a has the longest queue, c half of it"


def test_dynamo_credits_what_lies_behind_the_device() -> None:
    reports = fleet(a=0, b=0, c=0)
    blocks = in_tiers(a=(4, 0, 0), b=(0, 6, 0), c=(0, 0, 10))
    told = ask(made("dynamo"), reports, PROMPT_OF_TEN, blocks=blocks)
    assert (told.replica, told.why) == ("b", "cost 15.5 blocks"), (
        "10 to decode, 10 - 4.5 to compute"
    )
    told = ask(
        made("dynamo", host_weight=0.0, disk_weight=0.5), reports, PROMPT_OF_TEN, blocks=blocks
    )
    assert (told.replica, told.why) == ("c", "cost 15.0 blocks")
