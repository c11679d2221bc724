"""Requests that move between replicas say the same words, whatever happens meanwhile, and leave nothing behind."""

from __future__ import annotations

import asyncio
import random
import typing
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.clock import now
from penstock.core.events import Migrated, Stepped
from penstock.core.moving import KvCard, MoveOutcome
from penstock.lab.replay import replay_replica
from penstock.lab.replay_fleet import replay_fleet
from penstock.report.made import MadeFleet
from penstock.sim.channel import Link
from penstock.sim.loop import run
from tests.cluster.moving_world import SIZE, World

MODES = ["live", "blocking", "queued", "pull"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("delay_s", [0.0, 0.004, 0.03, 0.25])
def test_one_request_moves_and_goes_on(mode: str, delay_s: float) -> None:
    async def main() -> None:
        world = World(2)
        await world.start()
        asked = world.ask("a", list(range(40)), 60)
        await asyncio.sleep(delay_s)
        world.move("a", "r1", mode)
        await asyncio.sleep(0.2)
        (told,) = world.over
        assert told.outcome == "committed", told
        if mode == "queued" or delay_s > 0.02:
            assert (told.num_blocks == 0) == (mode == "queued")
        assert world.router.outstanding == {"r0": 0, "r1": 1}
        assert world.sites["r0"].host.replica.is_idle
        await world.end()
        world.check_texts()
        assert len(asked.ids) == 60
        await world.stop()

    run(main())


def test_what_is_at_the_target_already_is_not_copied() -> None:
    async def main() -> None:
        world = World(2)
        await world.start()
        shared = list(range(40))
        for place in range(2):  # round robin: both replicas know the prefix
            world.ask(f"before{place}", shared, 1)
        await asyncio.sleep(1.0)
        world.ask("a", [*shared, 7], 30)
        await asyncio.sleep(0.1)
        world.move("a", "r1", "blocking")
        await asyncio.sleep(0.2)
        (told,) = world.over
        assert told.outcome == "committed" and 1 <= told.num_blocks <= 4
        await world.end()
        world.check_texts()
        await world.stop()

    run(main())


def script(seed: int, count: int, *, kills: bool) -> World:
    """Requests, movements, cancels and deaths at random; then texts and blocks are looked at."""
    chance = random.Random(seed)
    world_of: list[World] = []

    async def main() -> None:
        world = World(
            3,
            num_blocks=chance.choice((14, 20, 60)),
            seed=seed,
            timeout_s=chance.choice((0.02, 5.0)),
        )
        world_of.append(world)
        await world.start()
        prefix = [chance.randrange(50) for _ in range(16)]
        for place in range(count):
            await asyncio.sleep(chance.choice((0.0, 0.001, 0.01, 0.05)))
            live = list(world.fleet._tickets)
            act = chance.random()
            if act < 0.4 or not live:
                own = [chance.randrange(50) for _ in range(chance.randint(1, 20))]
                world.ask(
                    f"q{place}",
                    [*prefix[: chance.choice((0, 16))], *own],
                    chance.randint(1, 20),
                    temperature=chance.choice((0.0, 1.0)),
                    seed=3,
                )
            elif act < 0.9:
                world.move(chance.choice(live), f"r{chance.randrange(3)}", chance.choice(MODES))
            elif act < 0.95 or not kills:
                world.cancel(chance.choice(live))
            else:
                name = f"r{chance.randrange(3)}"
                await world.kill(name)
                await asyncio.sleep(chance.choice((0.0, 0.01)))
                await world.bring_up(next(link for link in world.links if link.name == name))
        await world.end()
        world.check_texts()
        await world.stop()

    run(main())
    return world_of[0]


def test_whoever_is_preempted_while_it_moves_stays() -> None:
    async def main() -> None:
        world = World(2, num_blocks=20)
        world.fabric.link = Link(bytes_per_s=5e3)
        world.links.reverse()  # so that both requests go to r1
        await world.start()
        world.ask("a", list(range(36)), 30)
        world.ask("elsewhere", [1, 2, 3], 1)
        world.ask("b", list(range(3, 33)), 30)
        await asyncio.sleep(0.06)
        source = world.fleet._tickets["b"].replica
        world.move("b", "r0" if source == "r1" else "r1", "live")
        await world.end()
        assert [(told.outcome, told.pause_s) for told in world.over] == [("source_aborted", None)]
        world.check_texts()
        await world.stop()

    run(main())


def test_a_replica_is_drained_by_moving_what_runs_there() -> None:
    async def main() -> None:
        world = World(3, num_blocks=200)
        await world.start()
        for place in range(9):
            world.ask(f"q{place}", list(range(place, place + 20)), 80)
        await asyncio.sleep(0.2)
        began_at = now()
        await world.fleet.drain_replica("r1")
        assert now() - began_at < 0.3, "they were waited for"
        assert world.sites["r1"].host.replica.is_idle
        late = world.ask("late", [1, 2], 3)
        await world.end()
        assert late.error is None and not any(asked.error for asked in world.asked.values())
        world.check_texts()
        await world.stop()

    run(main())


def test_what_cannot_move_is_refused_and_why() -> None:
    async def main() -> None:
        world = World(2)
        await world.start()
        world.ask("two", [1, 2, 3], 30, n=2)
        world.ask("scored", [1, 2, 3], 30, prompt_logprobs=1)
        world.ask("a", [1, 2, 3], 30)
        await asyncio.sleep(0.05)
        home = {name: ticket.replica for name, ticket in world.fleet._tickets.items()}
        other = {name: "r0" if where == "r1" else "r1" for name, where in home.items()}
        for name in ("two", "scored"):
            world.move(name, other[name], "live")
        world.move("a", home["a"], "live")
        world.move("a", "r9", "live")
        world.move("nobody", "r1", "live")
        assert [told.outcome for told in world.over] == ["refused"] * 5
        assert ["2 answers" in world.over[0].why, "its prompt" in world.over[1].why] == [True, True]
        assert world.over[2].why == f"it is at {home['a']} already"
        assert world.over[3].why == "there is no replica 'r9'"
        assert world.over[4].why == "it has ended"
        await world.kill(other["a"])
        world.move("a", other["a"], "live")
        assert world.over[5].why == f"{other['a']} takes no requests"
        await world.fleet.drain()
        await world.stop()

    run(main())


def test_without_copies_a_request_moves_queued_alone() -> None:
    async def main() -> None:
        world = World(2)
        await world.start()
        for link in world.links:
            link._kv = KvCard(layout="", address="", block_size=SIZE, block_bytes=0)
        asked = world.ask("a", [1, 2, 3], 30)
        await asyncio.sleep(0.05)
        for mode in MODES:
            world.move("a", "r1", mode)
        assert [told.outcome for told in world.over] == ["refused", "refused", "refused"]
        assert "(queued)" in world.over[0].why and "(queued)" in world.over[1].why
        assert world.over[2].why == "it is moving already"  # the queued one had begun
        await world.end()
        assert world.over[-1].outcome == "committed" and len(asked.ids) == 30
        world.check_texts()
        await world.stop()

    run(main())


def check_scripts(seed: int, *, kills: bool) -> None:
    world = script(seed, 40, kills=kills)
    if kills:
        return
    assert not any(asked.error for asked in world.asked.values())
    for link in world.links:
        judge = replay_replica(world.events_of(link.name), world.parts_of(link.name))
        assert judge.num_decisions == sum(
            isinstance(event, Stepped) for event in world.events_of(link.name)
        )
    replay_fleet(world.events_of("fleet"), "fleet", MadeFleet(route={"name": "round-robin"}))


@given(st.integers(0, 1 << 32))
@settings(max_examples=3, deadline=None)
def test_moves_and_cancels_at_any_time(seed: int) -> None:
    check_scripts(seed, kills=False)


@given(st.integers(0, 1 << 32))
@settings(max_examples=3, deadline=None)
def test_replicas_that_die_at_any_time(seed: int) -> None:
    check_scripts(seed, kills=True)


@pytest.mark.slow
@given(st.integers(0, 1 << 32), st.booleans())
@settings(max_examples=200, deadline=None)
def test_anything_at_any_time(seed: int, kills: bool) -> None:
    check_scripts(seed, kills=kills)


@pytest.mark.slow
def test_the_scripts_reach_all_ends() -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(24):
        world = script(seed, 80, kills=seed % 2 == 1)
        outcomes.update(event.outcome for event in world.log.events if isinstance(event, Migrated))
    assert set(typing.get_args(MoveOutcome)) - set(outcomes) <= {"source_aborted"}, outcomes
    assert outcomes["committed"] > 100, outcomes


def test_a_drained_replica_sends_requests_to_those_of_their_stage_first() -> None:
    async def main() -> None:
        world = World(4, num_blocks=200, roles=("any", "any", "prefill", "decode"))
        await world.start()
        world.ask("a", list(range(20)), 80)
        await asyncio.sleep(0.2)
        ticket = world.fleet._tickets["a"]
        assert ticket.replica == "r0" and ticket.is_heard
        world.ask("b", list(range(20)), 80)  # so that the other one of any role is busier
        await asyncio.sleep(0.1)
        await world.fleet.drain_replica("r0")
        assert ticket.replica == "r3"
        await world.end()
        world.check_texts()
        await world.stop()

    run(main())
