"""What policies and predictors keep of jobs that come from other replicas, or leave for them, is kept no longer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.core.events import Arrived, Event, Finished, Opened, Stepped
from penstock.core.moving import Departed, Parted, Settled, Took
from penstock.cost.programs import SeenPrograms
from penstock.lab.replay import replay_replica
from penstock.policy.bandwidth import ARRIVED, Docket
from penstock.policy.order.vtc import Vtc
from penstock.report.log import Memory
from penstock.sim.loop import run
from tests.cluster.moving_world import World
from tests.cluster.test_movement import script
from tests.cost.test_programs import arrive, finish


def lives(log: Memory) -> Iterator[tuple[str, list[Event]]]:
    """The events of each replica from its start to its end, those that were killed left out."""
    of: dict[str, list[Event]] = {}
    for event in log.events:
        who = getattr(event, "who", "")
        if isinstance(event, Opened):
            of[who] = []
        of.setdefault(who, []).append(event)
    yield from ((who, events) for who, events in of.items() if who != "fleet")


@pytest.mark.parametrize("seed", range(3))
def test_whoever_left_or_was_dropped_is_forgotten(seed: int) -> None:
    num_left = num_steps = 0
    for _, events in lives(script(seed, 60, kills=seed == 2).log):
        fair, docket = Vtc(), Docket(0.9, 0.5, 64, 512)
        held: set[int] = set()
        for event in events:
            fair.observe(event)
            docket.observe(event)
            num_left += isinstance(event, Departed)
            if isinstance(event, Parted):
                held.add(event.move)
            elif isinstance(event, Settled):
                held.discard(event.move)
            elif isinstance(event, Stepped) and not held:
                num_steps += 1
                assert sum(fair._books.num_waiting.values()) == event.num_waiting
            elif isinstance(event, Took) and event.request in docket._of:
                seq, _ = docket._of[event.request]
                assert docket._row(seq)[ARRIVED] == event.at - event.age_s
        assert not fair._books.tenants() and not fair._books.num_waiting and not docket._live
    assert num_left > 5 and num_steps > 50


def test_a_request_that_goes_on_from_its_tokens_is_replayed_with_its_age() -> None:
    """Its replica died; where it goes on it was asked for, and had its first token, before it came."""
    world_of: list[World] = []

    async def main() -> None:
        world = World(2)
        world_of.append(world)
        await world.start()
        world.ask("a", list(range(20)), 40)
        await asyncio.sleep(0.2)
        await world.kill("r0")
        await world.end()
        await world.stop()

    run(main())
    events = world_of[0].events_of("r1")
    (came,) = [event for event in events if isinstance(event, Arrived)]
    (ended,) = [event for event in events if isinstance(event, Finished)]
    assert came.num_output and came.ages
    assert ended.arrived_at == came.at - came.ages[0] == pytest.approx(0.0, abs=0.01)
    assert ended.first_token_at is not None and ended.first_token_at < 0.1
    assert replay_replica(events, world_of[0].parts_of("r1")).num_decisions > 10


@pytest.mark.parametrize("seed", range(2))
def test_an_answer_ends_or_departs_once_and_not_both(seed: int) -> None:
    for _, events in lives(script(seed, 40, kills=False).log):
        known: dict[str, Any] = {}
        for event in events:
            if event.kind == "arrived":
                assert event.request not in known
                known[event.request] = event
            elif isinstance(event, Finished | Departed):
                del known[event.request]
        assert not known


def test_a_run_with_a_call_that_went_elsewhere_is_over_and_teaches_nothing() -> None:
    seen = SeenPrograms()
    arrive(seen, "one", "a", 0.0, 100)
    seen.observe(Departed(at=1.0, who="replica-0", request="one.a", seq=0))
    arrive(seen, "two", "a", 0.0, 100)
    finish(seen, "two", "a", 1.0, 50)
    arrive(seen, "three", "a", 1000.0, 100)
    assert seen.num_patterns == 1 and set(seen._runs) == {"three"}
