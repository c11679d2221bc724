"""Prefixes fetched from peers: the same words, fewer prompt tokens computed, and nothing held when it is over."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from penstock.core.clock import now
from penstock.core.errors import ReplicaLost
from penstock.core.events import Finished
from penstock.core.fetching import BlocksBrought, Pinned, SeekAnswered, SeekBegun, SeekLate
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Request, RequestId, Sampling
from penstock.engine.peers import PeersConfig
from penstock.lab.replay import replay_replica
from penstock.sim.channel import Link
from penstock.sim.loop import run
from tests.cluster.moving_world import POLICIES, SIZE, World

PREFIX = [3 + at % 40 for at in range(80)]  # 20 blocks
SECONDS_A_BLOCK = 96 / 2e4  # a copy of moving_world takes


def policies(fetch: str = "always", **more: object) -> dict[str, Any]:
    return {**POLICIES, "fetch": {"name": fetch, **more}}


def world_of(
    count: int = 2, *, fetch: str = "always", timeout_s: float = 5.0, **more: Any
) -> World:
    peers = PeersConfig(timeout_s=timeout_s)
    return World(count, policies=policies(fetch), peers=peers, num_blocks=60, **more)


def of(world: World, kind: type) -> list[Any]:
    return [event for event in world.log.events if isinstance(event, kind)]


def cached(world: World) -> dict[str, int]:
    return {event.request: event.num_cached for event in of(world, Finished)}


def played(main: Callable[[World], Coroutine[Any, Any, None]], **more: Any) -> World:
    """`main` after r0 has computed PREFIX and told of it; then all has to be over."""
    worlds: list[World] = []

    async def whole() -> None:
        world = world_of(**more)
        worlds.append(world)
        await world.start()
        world.ask("first", [*PREFIX, 1], 3)
        await asyncio.sleep(1.0)
        await main(world)
        await world.end()
        for site in world.sites.values():
            moves = site.host.replica._moves
            assert not moves.seeks.under_way and moves.pins.is_empty
        assert not world.fleet._fetches._open
        world.check_texts()
        await world.stop()

    run(whole())
    return worlds[0]


async def one_more(world: World) -> None:
    world.ask("second", [*PREFIX, 2], 3)


def test_a_prefix_that_a_peer_holds_is_not_computed() -> None:
    world = played(one_more)
    (begun,), (brought,) = of(world, SeekBegun), of(world, BlocksBrought)
    assert (begun.who, begun.peer, begun.num_blocks) == ("r1", "r0", 20)
    assert brought.error is None and brought.num_bytes == 20 * 96
    assert brought.at - begun.at >= 20 * SECONDS_A_BLOCK
    assert cached(world)["second"] == 80
    (pinned,) = of(world, Pinned)
    assert (pinned.who, pinned.num_blocks) == ("r0", 20)


def test_it_is_computed_where_the_policy_says_so() -> None:
    world = played(one_more, fetch="never")
    assert not of(world, SeekBegun) and cached(world)["second"] == 0


def test_what_copies_take_is_learned() -> None:
    """A block takes 4.8 ms here and 0.4 ms to compute: it is tried once."""

    async def main(world: World) -> None:
        for place in range(4):
            world.ask(f"again {place}", [*PREFIX[: 76 - 8 * place], 40 + place], 2)
            world.ask(f"other {place}", [place, 7, 9], 1)  # round robin: the next is r1's again
            await asyncio.sleep(2.0)
            world.sites["r1"].host.replica.ledger.reset_cache()

    world = played(main, fetch="cheaper")
    assert len(of(world, SeekBegun)) == 1


def test_what_is_here_already_is_not_asked_for() -> None:
    async def main(world: World) -> None:
        world.ask("half", [*PREFIX[:40], 9], 1)
        await asyncio.sleep(1.0)
        world.ask("elsewhere", [9, 9, 9], 1)
        world.ask("second", [*PREFIX, 2], 3)

    world = played(main)
    assert [event.num_blocks for event in of(world, SeekBegun)] == [10, 10]
    assert cached(world)["second"] == 80


def test_the_rest_of_what_the_peer_knows_as_one_is_shown() -> None:
    """The receiver computed the first half by itself, so nothing has told the owner's blocks apart there."""

    async def main(world: World) -> None:
        half = Request(
            id=RequestId("half"),
            model="m",
            prompt=TokenPrompt([*PREFIX[:40], 9]),
            sampling=Sampling(max_tokens=1, temperature=0.0),
        )
        world.sites["r1"].host.replica.submit(half)
        await asyncio.sleep(1.0)
        world.ask("second", [*PREFIX, 2], 3)

    world = played(main)
    (begun,), (pinned,) = of(world, SeekBegun), of(world, Pinned)
    assert (begun.num_blocks, pinned.num_blocks, len(pinned.before)) == (10, 10, 10)
    assert cached(world)["second"] == 80


def test_those_who_need_the_same_blocks_wait_for_one_copy() -> None:
    async def main(world: World) -> None:
        for place in range(5):
            world.ask(f"second {place}", [*PREFIX, 2 + place], 3)

    world = played(main)
    assert len(of(world, SeekBegun)) == 1
    assert [cached(world)[f"second {place}"] for place in range(5)] == [80] * 5


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_peer_that_has_forgotten_them_costs_nothing_else(when: str) -> None:
    """What it forgets before it is asked cannot be had; what it shows it keeps."""

    async def main(world: World) -> None:
        ledger = world.sites["r0"].host.replica.ledger
        if when == "before":
            ledger.reset_cache()
        world.ask("second", [*PREFIX, 2], 3)
        await asyncio.sleep(0.03)
        ledger.reset_cache()

    world = played(main)
    assert cached(world)["second"] == (0 if when == "before" else 80)


def test_a_peer_that_dies_costs_nothing_else() -> None:
    async def main(world: World) -> None:
        world.ask("second", [*PREFIX, 2], 3)
        await asyncio.sleep(0.03)
        await world.kill("r0")

    world = played(main)
    (brought,) = of(world, BlocksBrought)
    assert "gone while it was read" in brought.error
    assert cached(world)["second"] == 0


def test_a_peer_that_dies_before_it_answers_costs_nothing_else() -> None:
    async def main(world: World) -> None:
        world.ask("second", [*PREFIX, 2], 3)
        await asyncio.sleep(3e-4)
        await world.kill("r0")

    world = played(main)
    assert not of(world, BlocksBrought) and cached(world)["second"] == 0
    finished = {event.request: event for event in of(world, Finished)}
    assert finished["second"].at - finished["second"].arrived_at < 0.2


def test_a_peer_that_cannot_sum_up_says_so_and_keeps_nothing() -> None:
    async def main(world: World) -> None:
        async def sums(blocks: Sequence[int]) -> tuple[int, ...]:
            raise ReplicaLost("the card has no memory left to copy blocks with")

        world.sites["r0"].transport.sums = sums  # type: ignore[method-assign]
        world.ask("second", [*PREFIX, 2], 3)

    world = played(main)
    (answered,) = of(world, SeekAnswered)
    assert "no memory left" in answered.error
    finished = {event.request: event for event in of(world, Finished)}
    assert finished["second"].at - finished["second"].arrived_at < 0.2


def test_a_receiver_that_dies_leaves_nothing_behind() -> None:
    async def main(world: World) -> None:
        world.ask("second", [*PREFIX, 2], 3)
        await asyncio.sleep(0.03)
        assert not world.sites["r0"].host.replica._moves.pins.is_empty
        await world.kill("r1")
        await asyncio.sleep(0.01)
        assert world.sites["r0"].host.replica._moves.pins.is_empty

    world = played(main)
    assert cached(world)["second"] == 80, "r0 has them itself"


def test_blocks_that_come_spoilt_are_computed() -> None:
    async def main(world: World) -> None:
        world.sites["r1"].transport.spoils = True
        world.ask("second", [*PREFIX, 2], 3)

    world = played(main)
    (brought,) = of(world, BlocksBrought)
    assert "not what the peer has" in brought.error and cached(world)["second"] == 0


def test_whoever_has_waited_long_enough_computes() -> None:
    """The copy goes on, and its blocks are found by those who come later."""

    async def main(world: World) -> None:
        world.fabric.link = Link(bytes_per_s=500.0)  # 3.84 s in all
        began = now()
        asked = world.ask("second", [*PREFIX, 2], 3)
        await asyncio.wait_for(asked.task, 1.0)  # type: ignore[arg-type]
        assert 0.3 <= now() - began < 0.5

    world = played(main, timeout_s=0.3)
    assert len(of(world, SeekLate)) == 1 and cached(world)["second"] == 0
    (brought,) = of(world, BlocksBrought)
    assert brought.error is None


def test_one_that_is_cancelled_is_forgotten_at_once() -> None:
    async def main(world: World) -> None:
        world.ask("second", [*PREFIX, 2], 3)
        await asyncio.sleep(0.03)
        world.cancel("second")
        await asyncio.sleep(0.01)
        assert not world.fleet.num_outstanding

    played(main)


def test_a_prompt_that_does_not_fit_waits_and_asks_for_nothing() -> None:
    async def main(world: World) -> None:
        world.ask("here", [1, 2, 3], 1)
        world.ask("large", [at % 11 for at in range(150)], 60)  # r0
        world.ask("large too", [at % 13 for at in range(150)], 60)  # r1
        await asyncio.sleep(0.5)
        world.ask("there", [1, 2, 4], 1)
        world.ask("second", [*PREFIX, 2], 3)
        await asyncio.sleep(0.02)
        assert not of(world, SeekBegun)

    played(main)


@pytest.mark.parametrize("seed", range(6))
def test_at_random_the_words_are_right(seed: int) -> None:
    """Small memories, deaths, cancels, peers that forget, copies that come spoilt or too late."""
    chance = random.Random(seed)
    worlds: list[World] = []

    async def main() -> None:
        world = World(
            3,
            policies=policies(chance.choice(("always", "cheaper"))),
            peers=PeersConfig(timeout_s=chance.choice((0.02, 1.0)), least_blocks=1),
            num_blocks=chance.choice((20, 40)),
            seed=seed,
        )
        worlds.append(world)
        world.fabric.link = Link(latency_s=1e-4, bytes_per_s=chance.choice((2e4, 1e6)))
        await world.start()
        families = [[chance.randrange(50) for _ in range(40)] for _ in range(3)]
        for place in range(60):
            await asyncio.sleep(chance.choice((0.0, 0.001, 0.02, 0.2)))
            live, act = list(world.fleet._tickets), chance.random()
            site = world.sites.get(f"r{chance.randrange(3)}")
            if act < 0.7 or not live:
                own = [chance.randrange(50) for _ in range(chance.randint(1, 12))]
                ids = [*chance.choice(families)[: chance.choice((12, 28, 40))], *own]
                world.ask(f"q{place}", ids, chance.randint(1, 12))
            elif act < 0.8:
                world.cancel(chance.choice(live))
            elif act < 0.88 and site is not None:
                site.host.replica.ledger.reset_cache()
            elif act < 0.94 and site is not None:
                site.transport.spoils = not site.transport.spoils
            elif site is not None and seed % 2:
                await world.kill(site.link.name)
                await asyncio.sleep(chance.choice((0.0, 0.01)))
                await world.bring_up(site.link)
        await world.end()
        world.check_texts()
        await world.stop()

    run(main())
    world = worlds[0]
    assert of(world, BlocksBrought)


def test_the_log_of_both_replays() -> None:
    async def main(world: World) -> None:
        for place in range(4):
            world.ask(f"second {place}", [*PREFIX[: 80 - SIZE * place], 2 + place], 3)
            await asyncio.sleep(0.05)

    world = played(main)
    assert of(world, BlocksBrought) and of(world, Pinned)
    for who in ("r0", "r1"):
        judge = replay_replica(world.events_of(who), world.parts_of(who))
        assert judge.num_decisions >= 4
