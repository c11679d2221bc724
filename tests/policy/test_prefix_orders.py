"""SGLang's orders by cached prefix, worked by hand: blocks of 4 positions, hashes of one letter a block."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import pytest

from penstock.core.types import Job
from penstock.policy import find, order
from penstock.policy.batch.vllm_v1 import VllmV1
from penstock.policy.order import STABLE
from penstock.policy.order.dfs_weight import DfsWeight, num_alike
from penstock.policy.order.lpm import Lpm
from tests.laws.model_ledger import ModelLedger
from tests.laws.views import Columns, HalfLengths
from tests.policy.test_order import FlatCost
from tests.policy.world import CAPS, Replica, make_job


def path(text: str) -> list[bytes]:
    """Hashes that name all that is before them."""
    return [text[: place + 1].encode() for place in range(len(text))]


def job(seq: int, text: str, **more: int) -> Job:
    return make_job(seq, 4 * len(text) + 2, hashes=path(text), **more)


def ledger_with(*cached: str) -> ModelLedger:
    """Jobs that ended left these behind."""
    ledger = ModelLedger(200, 4)
    for seq, text in enumerate(cached, 1000):
        gone = job(seq, text)
        assert ledger.reserve(gone, gone.known)
        gone.computed = gone.known
        ledger.release(gone)
    return ledger


def ranked(
    policy: order.Policy, waiting: Sequence[Job], ledger: ModelLedger | None
) -> tuple[list[int], order.Decision]:
    view = order.View(
        0.0,
        random.Random(0),
        waiting,
        (),
        FlatCost(),
        HalfLengths(),
        lambda: Columns(waiting),
        ledger,
    )  # type: ignore[arg-type]
    decision = policy.decide(view)
    order.law(view, decision)
    return [each.seq for each in decision.ranking], decision


def test_longest_match_goes_first_and_equals_in_arrival_order() -> None:
    waiting = [job(0, "zz"), job(1, "abx"), job(2, "abcy"), job(3, "aby"), job(4, "q")]
    assert ranked(Lpm(), waiting, ledger_with("abcd"))[0] == [2, 1, 3, 0, 4]


def test_of_newcomers_that_begin_alike_one_goes_ahead() -> None:
    """Eight positions are two blocks: "mn" is shared by 0, 1 and 4; 3 shares one block only; 2 is cached anyway."""
    waiting = [
        job(0, "mnx"),
        job(1, "mny"),
        job(2, "abc"),
        job(3, "mo"),
        job(4, "mnz"),
        job(5, "q"),
    ]
    policy = Lpm(checked_tokens=4, shared_tokens=8)
    assert ranked(policy, waiting, ledger_with("ab"))[0] == [2, 0, 3, 5, 1, 4]
    assert ranked(Lpm(checked_tokens=4, shared_tokens=5), waiting, ledger_with("ab"))[0] == [
        2,
        0,
        3,
        5,
        1,
        4,
    ]
    assert ranked(Lpm(shared_tokens=80), waiting, ledger_with("ab"))[0] == [2, 0, 1, 3, 4, 5]


def test_branches_go_whole_and_the_heaviest_first() -> None:
    """The branch of "ab" weighs 4 (two below x, one below c, one at its end), that of "b" 3."""
    waiting = [
        job(0, "abcq"), job(1, "abxq"), job(2, "abxr"), job(3, "abq"), job(4, "bq"), job(5, "br"),
        job(6, "bs"), job(7, "zz"),
    ]  # fmt: skip
    random.Random(2).shuffle(waiting)
    ranking, _ = ranked(DfsWeight(), waiting, ledger_with("abc", "abx", "b"))
    assert set(ranking[:2]) == {1, 2} and ranking[2:4] == [0, 3]
    assert set(ranking[4:7]) == {4, 5, 6} and ranking[7] == 7


@pytest.mark.parametrize("seed", range(5))
def test_depth_first_order_is_that_of_a_plain_tree(seed: int) -> None:
    """Against a tree of single blocks, walked as SGLang walks its own."""
    rng = random.Random(seed)
    texts = ["".join(rng.choice("ab") for _ in range(rng.randrange(7))) for _ in range(40)]
    waiting = [job(seq, text + "!") for seq, text in enumerate(texts)]
    ranking, _ = ranked(DfsWeight(), waiting, ledger_with(*texts))

    def below(text: str) -> int:
        return sum(each.startswith(text) for each in texts)

    def walk(text: str) -> list[int]:
        branches = [text + letter for letter in "ab" if below(text + letter)]
        branches.sort(key=lambda b: (-below(b), [t.startswith(b) for t in texts].index(True)))
        own = [seq for seq, each in enumerate(texts) if each == text]
        return list(itertools.chain(*map(walk, branches), own))

    assert ranking == walk("")


def test_alike_is_found_by_halving() -> None:
    assert num_alike(path("abcd"), path("abxy"), 0, 4) == 2
    assert num_alike(path("abcd"), path("abcd"), 1, 3) == 3
    assert num_alike(path("a"), path("b"), 0, 1) == 0


@pytest.mark.parametrize("policy", [Lpm(), DfsWeight()], ids=["lpm", "dfs-weight"])
def test_long_queues_go_in_arrival_order(policy: Lpm | DfsWeight) -> None:
    waiting = [job(seq, "abc" if seq == 128 else "z") for seq in range(129)]
    ranking, decision = ranked(policy, waiting, ledger_with("abcd"))
    assert ranking == list(range(129)) and decision.stable_for == STABLE
    assert ranked(policy, waiting[1:], ledger_with("abcd"))[0][0] == 128
    assert ranked(policy, waiting[1:], None)[0] == list(range(1, 129))


@pytest.mark.parametrize("name", ["lpm", "dfs-weight"])
def test_more_of_the_cache_is_found(name: str) -> None:
    """Six families of prompts in a memory that holds two: arrival order loses what these orders find."""
    found = {}
    for blocks in (40, 800):
        for ordering in ("fcfs", name):
            rng = random.Random(4)
            it = Replica(
                VllmV1(max_tokens=64),
                ModelLedger(blocks, 4),
                find("order", ordering)(),
                caps=dataclasses.replace(CAPS, max_jobs=3),
            )
            for seq in range(60):
                family = "abcdef"[rng.randrange(6)] * 10
                it.waiting.append(job(seq, family + chr(200 + seq), max_tokens=3))
            it.run()
            found[blocks, ordering] = it.adopted_tokens
    assert found[40, name] > 1.3 * found[40, "fcfs"] > 0
    assert found[800, name] == pytest.approx(found[800, "fcfs"], rel=0.05)


def test_parameters_are_checked() -> None:
    for name in ("most_waiting", "shared_tokens"):
        with pytest.raises(ValueError, match=name):
            Lpm(**{name: 0})
    with pytest.raises(ValueError, match="most_waiting"):
        DfsWeight(most_waiting=0)
