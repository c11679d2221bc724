"""A fleet over replicas that do what the test says: routing, retries, losses, cancels, draining, and the log."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.fleet import Fleet
from penstock.cluster.fleets import Fleets
from penstock.cluster.router import Router
from penstock.core.errors import (
    BadRequest,
    ContextTooLong,
    Draining,
    Overloaded,
    PenstockError,
    ReplicaLost,
    StepFailed,
    UnknownModel,
)
from penstock.core.events import Arrived, Ended, Event, Refused, Routed
from penstock.core.prompt import HashedPrompt
from penstock.core.types import Output, Request, RequestId
from penstock.policy import find, route
from penstock.report.log import Memory
from penstock.sim.loop import run
from tests.cluster.null import NullReplica


def request(name: str, n: int = 1) -> Request:
    return Request(id=RequestId(name), model="m", prompt=HashedPrompt(8), n=n)


class World:
    """A fleet of null replicas; `ask` starts a request and keeps what came of it."""

    def __init__(
        self, count: int = 2, policy: str = "round-robin", max_outstanding: int | None = None
    ) -> None:
        self.replicas = [NullReplica(f"r{i}") for i in range(count)]
        self.log = Memory()
        self.router = Router("fleet", find("route", policy)(), log=self.log, is_checked=True)
        self.fleet = Fleet("m", self.replicas, self.router, max_outstanding=max_outstanding)
        self.outputs: dict[str, list[Output]] = {}
        for replica in self.replicas:
            replica.say()

    def ask(self, name: str, n: int = 1) -> asyncio.Task[None]:
        self.outputs[name] = []
        return asyncio.create_task(self.fleet.submit(request(name, n), self.outputs[name].append))

    def holder(self, name: str) -> NullReplica:
        (found,) = [replica for replica in self.replicas if name in replica.held]
        return found

    def check_idle(self) -> None:
        assert self.fleet.num_outstanding == 0
        assert set(self.router.outstanding.values()) <= {0}


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def in_virtual_time(body: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def test() -> None:
        run(body())  # type: ignore[arg-type]

    test.__name__, test.__doc__ = body.__name__, body.__doc__
    return test


@in_virtual_time
async def test_tokens_come_as_they_are_told_and_submit_returns_at_the_last_end() -> None:
    world = World()
    task = world.ask("a", n=2)
    await settle()
    replica = world.holder("a")
    replica.token("a")
    replica.end("a")
    await settle()
    assert not task.done() and [o.finish for o in world.outputs["a"]] == [None, "stop"]
    replica.end("a", "length")
    await task
    assert [(o.answer, o.finish) for o in world.outputs["a"]] == [
        (0, None),
        (0, "stop"),
        (1, "length"),
    ]
    world.check_idle()


@in_virtual_time
async def test_a_refusal_goes_to_every_other_replica_once() -> None:
    world = World(3)
    task = world.ask("a")
    for _ in range(3):
        await settle()
        world.holder("a").refuse("a", Overloaded("full", retry_after_s=7))
    with pytest.raises(Overloaded) as caught:
        await task
    assert caught.value.retry_after_s == 7
    assert sorted(name for r in world.replicas for name in r.seen) == ["a", "a", "a"]
    assert all(r.seen == ["a"] for r in world.replicas)
    assert [e.code for e in world.log.events if isinstance(e, Refused)] == ["Overloaded"]
    world.check_idle()


@in_virtual_time
async def test_a_refusal_that_is_the_callers_fault_is_final() -> None:
    world = World()
    task = world.ask("a")
    await settle()
    world.holder("a").refuse("a", ContextTooLong("too long", param="prompt"))
    with pytest.raises(ContextTooLong) as caught:
        await task
    assert caught.value.param == "prompt"
    assert sum(len(r.seen) for r in world.replicas) == 1
    world.check_idle()


@in_virtual_time
async def test_a_request_that_had_begun_is_lost_with_its_replica() -> None:
    world = World()
    task = world.ask("a")
    await settle()
    replica = world.holder("a")
    replica.token("a")
    replica.lose()
    with pytest.raises(ReplicaLost):
        await task
    assert sum(len(r.seen) for r in world.replicas) == 1
    assert [e.code for e in world.log.events if isinstance(e, Refused)] == ["ReplicaLost"]
    world.check_idle()


@in_virtual_time
async def test_a_replica_that_refused_is_not_asked_again_when_the_next_is_lost() -> None:
    world = World()
    task = world.ask("a")
    await settle()
    world.holder("a").refuse("a", Draining("leaving"))
    await settle()
    world.holder("a").lose()
    with pytest.raises(ReplicaLost):
        await task
    assert [r.seen for r in world.replicas] == [["a"], ["a"]]
    world.check_idle()


@in_virtual_time
async def test_a_request_without_output_moves_when_its_replica_is_lost() -> None:
    world = World()
    task = world.ask("a")
    await settle()
    first = world.holder("a")
    first.lose()
    await settle()
    second = world.holder("a")
    assert second is not first
    second.end_all("a")
    await task
    world.check_idle()


@in_virtual_time
async def test_nobody_alive_is_told_as_such_with_a_time_to_come_back() -> None:
    world = World()
    for replica in world.replicas:
        replica.lose()
    with pytest.raises(ReplicaLost, match="0 are running") as caught:
        await world.fleet.submit(request("a"))
    assert caught.value.retry_after_s is not None
    world.replicas[0].revive()
    task = world.ask("b")
    await settle()
    world.replicas[0].end_all("b")
    await task


@in_virtual_time
async def test_cancelling_reaches_the_replica_in_the_same_turn_and_counts_until_it_answers() -> (
    None
):
    world = World()
    task = world.ask("a")
    await settle()
    replica = world.holder("a")
    replica.token("a")
    task.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert replica.held["a"].is_cancelled
    assert world.router.outstanding[replica.name] == 1
    replica.end_all("a")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(world.outputs["a"]) == 1, "nothing is told after the caller left"
    world.check_idle()


@in_virtual_time
async def test_draining_refuses_the_new_and_waits_for_the_old() -> None:
    world = World()
    task = world.ask("a")
    await settle()
    draining = asyncio.create_task(world.fleet.drain())
    await settle()
    with pytest.raises(Draining) as caught:
        await world.fleet.submit(request("b"))
    assert caught.value.retry_after_s is not None
    assert not draining.done()
    world.holder("a").end_all("a")
    await task
    await draining


@in_virtual_time
async def test_a_failed_step_is_told_and_raised() -> None:
    world = World()
    task = world.ask("a", n=2)
    await settle()
    replica = world.holder("a")
    replica.end("a", "error", "numbers went wrong")
    replica.end("a")
    with pytest.raises(StepFailed, match="numbers went wrong"):
        await task
    world.check_idle()


@in_virtual_time
async def test_the_bound_on_outstanding_requests() -> None:
    world = World(max_outstanding=1)
    task = world.ask("a")
    await settle()
    with pytest.raises(Overloaded):
        await world.fleet.submit(request("b"))
    world.holder("a").end_all("a")
    await task
    world.check_idle()


@in_virtual_time
async def test_a_name_in_use_is_refused_and_harms_nobody() -> None:
    world = World()
    task = world.ask("a")
    await settle()
    with pytest.raises(BadRequest):
        await world.fleet.submit(request("a"))
    world.holder("a").end_all("a")
    await task


@in_virtual_time
async def test_a_callback_that_raises_ends_its_own_request_only() -> None:
    world = World(1)

    def broken(output: Output) -> None:
        raise LookupError("the caller's own")

    task = asyncio.create_task(world.fleet.submit(request("a"), broken))
    other = world.ask("b")
    await settle()
    replica = world.replicas[0]
    replica.token("a")
    replica.token("b")
    with pytest.raises(LookupError):
        await task
    assert replica.held["a"].is_cancelled and not replica.held["b"].is_cancelled
    replica.end_all("a")
    replica.end_all("b")
    await other
    world.check_idle()


class Whimsical:
    """Takes the first replica, until it fails."""

    fails = False
    cannot_observe = False

    def decide(self, view: route.View) -> route.Decision:
        if self.fails:
            raise ZeroDivisionError("a policy's mistake")
        alive = [report.replica for report in view.reports if report.is_alive]
        return route.Decision(replica=alive[0] if alive else None, why="first")

    def observe(self, event: Event) -> None:
        if self.cannot_observe:
            raise LookupError("cannot take it in")


def whimsical(world: World) -> Whimsical:
    policy = Whimsical()
    world.router._policy, world.router._observe = policy, policy.observe
    return policy


@in_virtual_time
async def test_a_route_policy_that_raises_fails_its_request_and_leaves_nothing_behind() -> None:
    world = World()
    policy = whimsical(world)
    policy.fails = True
    with pytest.raises(StepFailed, match="a policy's mistake") as caught:
        await world.fleet.submit(request("a"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    world.check_idle()
    policy.fails = False
    task = world.ask("a")
    await settle()
    world.holder("a").end_all("a")
    await task
    async with asyncio.timeout(1):
        await world.fleet.drain()


@in_virtual_time
async def test_all_requests_of_a_lost_replica_end_when_its_policy_fails_meanwhile() -> None:
    world = World()
    policy = whimsical(world)
    tasks = [world.ask(name) for name in "abc"]
    await settle()
    policy.fails = True
    world.replicas[0].lose()
    async with asyncio.timeout(1):
        found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in found] == [StepFailed] * 3
    world.check_idle()
    async with asyncio.timeout(1):
        await world.fleet.drain()


@in_virtual_time
async def test_a_policy_that_cannot_observe_hurts_nobody() -> None:
    world = World()
    whimsical(world).cannot_observe = True
    task = world.ask("a")
    await settle()
    world.holder("a").end_all("a")
    await task
    world.check_idle()


@in_virtual_time
async def test_models_are_found_by_name_and_alias() -> None:
    world = World()
    service = Fleets({"m": world.fleet, "m-latest": world.fleet})
    assert service.models() == ["m", "m-latest"]
    assert [report.replica for report in service.reports()] == ["r0", "r1"]
    with pytest.raises(UnknownModel, match="m-latest") as caught:
        await service.submit(Request(id=RequestId("a"), model="x", prompt=HashedPrompt(8)))
    assert caught.value.param == "model"


STEPS = st.one_of(
    st.tuples(st.just("ask"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["token", "end", "refuse", "cancel"]), st.integers(0, 99)),
    st.tuples(st.sampled_from(["lose", "revive", "turns"]), st.integers(0, 2)),
)


@dataclass
class Tally:
    """What the callers saw."""

    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)


async def play(world: World, steps: list[tuple[str, int]]) -> Tally:
    tally = Tally()
    for number, (what, which) in enumerate(steps):
        held = [(r, name) for r in world.replicas for name in r.held]
        if what == "ask":
            name = f"q{number}"
            tally.answers[name] = which
            tally.tasks[name] = world.ask(name, which)
        elif what == "turns":
            await settle()
        elif what == "lose":
            world.replicas[which].lose()
        elif what == "revive":
            world.replicas[which].revive()
        elif what == "cancel" and tally.tasks:
            list(tally.tasks.values())[which % len(tally.tasks)].cancel()
        elif held and what != "cancel":
            replica, name = held[which % len(held)]
            if what == "refuse":
                if replica.held[name].left == list(range(replica.held[name].request.n)):
                    replica.refuse(name, Overloaded("full"))
            else:
                getattr(replica, what)(name)
        count = Counter(name for r in world.replicas for name in r.held)
        assert not count or max(count.values()) == 1, "a request stands at two replicas"
    return tally


@given(st.lists(STEPS, max_size=40), st.sampled_from(["round-robin", "least", "p2c"]))
@settings(max_examples=150, deadline=None)
def test_nothing_is_lost_or_doubled_whatever_happens(
    steps: list[tuple[str, int]], policy: str
) -> None:
    async def body() -> None:
        world = World(3, policy)
        tally = await play(world, steps)
        for _ in range(4):  # let whatever is left come to an end
            await settle()
            for replica in world.replicas:
                for name in list(replica.held):
                    replica.end_all(name)
        await settle()
        for name, task in tally.tasks.items():
            assert task.done(), f"{name} never ended"
            ends = [o.answer for o in world.outputs[name] if o.finish is not None]
            assert len(ends) == len(set(ends)), f"an answer of {name} ended twice"
            if not task.cancelled() and task.exception() is None:
                assert len(ends) == tally.answers[name]
            elif not task.cancelled():
                assert isinstance(task.exception(), PenstockError)
        world.check_idle()
        check_log(world)

    run(body())


def check_log(world: World) -> None:
    """Each choice is followed by exactly one end, and the counts of the log are those that policies saw."""
    outstanding: Counter[str] = Counter()
    tried: dict[str, list[str]] = {}
    for event in world.log.events:
        if isinstance(event, Arrived):
            tried[event.request] = []
        elif isinstance(event, Routed) and event.replica is not None:
            assert event.replica not in tried[event.request]
            tried[event.request].append(event.replica)
            outstanding[event.replica] += 1
        elif isinstance(event, Ended):
            assert tried[event.request][-1] == event.replica
            outstanding[event.replica] -= 1
            assert outstanding[event.replica] >= 0
    assert not +outstanding


@in_virtual_time
async def test_a_suspect_gets_no_requests_unless_it_is_the_last() -> None:
    world = World(2)
    first, second = world.replicas
    first.is_suspect = True
    first.say()
    for name in "abc":
        world.ask(name)
    await settle()
    assert (first.seen, second.seen) == ([], ["a", "b", "c"])
    second.is_suspect = True
    second.say()
    world.ask("d")
    await settle()
    assert second.seen == ["a", "b", "c", "d"], "a doubtful replica is better than none"
    first.is_suspect = False
    first.say()
    world.ask("e")
    await settle()
    assert first.seen == ["e"]


@in_virtual_time
async def test_a_suspect_is_trusted_again_when_the_others_are_gone() -> None:
    world = World(2)
    first, second = world.replicas
    first.is_suspect = True
    first.say()
    second.lose()
    world.ask("a")
    await settle()
    assert first.seen == ["a"], "a doubtful replica is better than none"


@in_virtual_time
async def test_that_one_replica_drains_is_no_reason_for_the_caller() -> None:
    world = World(2)
    task = world.ask("a")
    for error in (Overloaded("full"), Draining("this replica is shutting down")):
        await settle()
        world.holder("a").refuse("a", error)
    with pytest.raises(Overloaded, match="none of the 2 replicas"):
        await task
