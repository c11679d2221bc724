"""Laws of all policies together: whichever sets of them serve, no text changes, nothing is lost, nobody starves.

Every pair of policies of the table (and three laws of circumstance: lanes, host memory, repeated steps) is played once
by default, and hypothesis draws more; all triples of batch, admit and evict, and many more draws, are slow.
tests/policy/combination.py says what is held to account, tests/policy/hashed_model.py why a wrong block shows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.events import Finished, Stepped, Suspended
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Request, RequestId, Sampling, Slo
from penstock.engine.replica import Replica
from penstock.policy import TABLE
from tests.policy.combination import SIZE, Case, Played, play, with_length

SLOTS = ("batch", "order", "evict", "admit", "blocks")
KINDS = {"blocks": "evict"}
FAIR = ("fcfs", "requeue", "vtc", "drr", "sjf")
MOST_RIVALS = (
    120  # resident lets victims compete: there he comes in and leaves again, a token at a time
)


def names(slot: str) -> list[str]:
    return list(TABLE[KINDS.get(slot, slot)])


def covering() -> list[dict[str, str]]:
    """Sets of policies in which every two policies of different slots meet. Greedy, and the same each time."""
    rng = random.Random(5)
    missing = {
        ((one, a), (other, b))
        for one, other in itertools.combinations(SLOTS, 2)
        for a, b in itertools.product(names(one), names(other))
    }
    found = []
    while missing:
        must = dict(min(missing))
        drawn = [{slot: rng.choice(names(slot)) for slot in SLOTS} | must for _ in range(40)]
        best = max(drawn, key=lambda each: len(pairs(each) & missing))
        missing -= pairs(best)
        found.append(best)
    return found


def pairs(chosen: Mapping[str, str]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return set(itertools.combinations([(slot, chosen[slot]) for slot in SLOTS], 2))


def circumstances(seed: int) -> dict[str, Any]:
    rng = random.Random(f"circumstances {seed}")
    host_blocks, lanes = rng.choice((0, 0, 12)), rng.choice((1, 2))
    # Blocks of repeated steps are not known where blocks move.
    max_repeat = 1 if host_blocks else rng.choice((1, 40))
    return {
        "limit": rng.choice(names("limit")),
        "num_blocks": rng.randint(8, 20),
        "host_blocks": host_blocks,
        "mode": rng.choice(("sync", "async", "adaptive")),
        "lanes": lanes,
        "max_jobs": rng.choice((2, 5, 50)),
        "max_tokens": rng.choice((3, 16, 1 << 20)),
        "max_repeat": max_repeat,
        "has_prefix_cache": rng.random() < 0.8,
        "has_layer_ranges": rng.random() < 0.8,
        "tokens": rng.choice((12, 12, 12, None)),
        "num_ousted": rng.choice((0, 0, 6)),
        "num_requests": rng.randint(1, 10),
        "seed": seed,
        "store": rng.choice(("hash", "radix")),
    }


def made_case(chosen: Mapping[str, str], seed: int) -> Case:
    found = circumstances(seed)
    if chosen["batch"] == "flow-prefill":  # long steps, and many who want them stopped
        found |= {"tokens": None, "max_tokens": 1 << 20, "max_jobs": 50, "num_requests": 25}
    return Case(**chosen, **found)


PATIENT = [
    name for name in names("batch") if name not in ("jit", "leftover")
]  # which rank by worth, or by priority, whoever came first
SETS = covering()
CASES = [made_case(chosen, seed) for seed, chosen in enumerate(SETS)]
PLAYED: list[Played] = []
any_case = st.builds(
    made_case,
    st.fixed_dictionaries({slot: st.sampled_from(names(slot)) for slot in SLOTS}),
    st.integers(1000, 1 << 32),
)
patient = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.parametrize("batching", names("batch"))
def test_every_pair_of_policies_keeps_the_laws(batching: str) -> None:
    for case in CASES:
        if case.batch == batching:
            PLAYED.append(play(case))


def test_the_cases_reach_what_they_are_about() -> None:
    """Otherwise the laws above would say little: what must have happened, and how often at least."""
    assert len({case.batch for case in CASES}) == len(TABLE["batch"])
    if len(PLAYED) < len(CASES):
        pytest.skip("run the tests of this file together")
    steps = [event for played in PLAYED for event in played.of(Stepped)]
    ended = [event for played in PLAYED for event in played.of(Finished)]
    reached = {
        "preempted": sum(played.num_preemptions for played in PLAYED),
        "found a prefix": sum(event.num_cached > 0 for event in ended),
        "cancelled": sum(event.reason == "cancelled" for event in ended),
        "cancelled half way": sum(
            event.reason == "cancelled" and event.num_output > 0 for event in ended
        ),
        "stopped": sum(event.reason == "stop" for event in ended),
        "one of several answers": sum(event.answer > 0 for event in ended),
        "moved to host memory": sum(len(event.offloaded) for event in steps),
        "moved back": sum(len(event.loaded) for event in steps),
        "a second lane": sum(event.lane > 0 for event in steps),
        "part of the layers": sum(len(event.partial) for event in steps),
        "steps repeated": sum(event.repeat > 1 for event in steps),
        "suspended": sum(len(played.of(Suspended)) for played in PLAYED),
    }
    few = {name: count for name, count in reached.items() if count < 10}
    assert not few, f"of all cases together only {few}"


@settings(patient, max_examples=60)
@given(case=any_case)
def test_any_combination_keeps_the_laws(case: Case) -> None:
    play(case)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(patient, max_examples=5000)
@given(case=any_case)
def test_many_combinations_keep_the_laws(case: Case) -> None:
    play(case)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batching", names("batch"))
def test_every_triple_keeps_the_laws(batching: str) -> None:
    """All of batch, admit and evict, under each order in turn, with little memory."""
    rng = random.Random(batching)
    for admitting, evicting in itertools.product(names("admit"), names("evict")):
        for ordering in names("order"):
            seed = rng.randrange(1 << 32)
            chosen = {"order": ordering, "admit": admitting, "batch": batching, "evict": evicting}
            case = made_case(chosen, seed)
            play(dataclasses.replace(case, num_blocks=rng.randint(6, 12), num_requests=10))


# ---------------------------------------------------------------------- nobody starves


def flood(batching: str, ordering: str, admitting: str, evicting: str, seed: int) -> Played:
    case = Case(
        order=ordering, admit=admitting, batch=batching, evict=evicting, seed=seed,
        lanes=2 if batching == "semi-pd" else 1, num_blocks=24, max_jobs=4,
    )  # fmt: skip
    return flooded(case)


@pytest.mark.parametrize("batching", PATIENT)
def test_nobody_starves_under_a_fair_order(batching: str) -> None:
    """Whoever is worst off by every other measure ends while a flood of others goes on for as long as he waits."""
    others = zip(itertools.cycle(names("admit")), itertools.cycle(names("evict")), strict=False)
    for seed, (ordering, (admitting, evicting)) in enumerate(zip(FAIR, others, strict=False)):
        flood(batching, ordering, admitting, evicting, seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batching", PATIENT)
def test_nobody_starves_whoever_leaves(batching: str) -> None:
    for seed, chosen in enumerate(itertools.product(FAIR, names("admit"), names("evict"))):
        flood(batching, *chosen, seed)


def flooded(case: Case) -> Played:
    async def ask(played: Played, replica: Replica) -> None:
        """Five rivals at any time: short, with a beginning that is cached, urgent; then one that is none of it."""
        rng = random.Random(case.seed)
        shared = [rng.randrange(50) for _ in range(2 * SIZE)]

        def submit(name: str, request: Request) -> None:
            request = with_length(dataclasses.replace(request, id=RequestId(name)))
            played.asked.append(request)
            replica.submit(request)

        def rival() -> Request:
            ids = TokenPrompt([*shared, *(rng.randrange(50) for _ in range(rng.randint(1, 5)))])
            return made(ids, rng.randint(1, 6), tenant="many", priority=0, slo=Slo(ttft_s=0.05))

        ids = TokenPrompt([rng.randrange(50) for _ in range(48)])
        num_rivals = 0
        while not (heard := played.told.get(("one", 0))) or heard[-1].finish is None:
            ended = {one.request for one in played.of(Finished)}
            while num_rivals - len(ended) < 5:
                assert num_rivals < MOST_RIVALS, f"he starves under {case}"
                submit(f"r{num_rivals}", rival())
                num_rivals += 1
                if num_rivals == 5:
                    submit("one", made(ids, 30, tenant="one", priority=2, slo=Slo()))
            await asyncio.sleep(0.005)

    return play(case, ask)


def made(ids: TokenPrompt, tokens: int, **more: Any) -> Request:
    sampling = Sampling(max_tokens=tokens, temperature=0.0)
    return Request(id=RequestId(""), model="m", prompt=ids, sampling=sampling, **more)
