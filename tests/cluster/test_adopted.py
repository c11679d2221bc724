"""A replica that outlives its controller: another one takes it over, and nothing of the old one is left or heard."""

from __future__ import annotations

import asyncio

from penstock.cluster.fleet import Fleet
from penstock.cluster.link import ReplicaLink
from penstock.cluster.router import Router
from penstock.core.types import Output
from penstock.engine.host import Host
from penstock.net import local
from penstock.policy import find
from penstock.report.log import Memory
from penstock.sim.loop import run
from tests.cluster.test_link_and_host import World, request


def second_controller() -> tuple[Fleet, ReplicaLink]:
    link = ReplicaLink("r0")
    router = Router("fleet", find("route", "least")(), log=Memory(), is_checked=True)
    return Fleet("m", [link], router), link


async def host_of(world: World) -> Host:
    """The replica of a world with one, served by a host that the test holds."""
    near, far = local.pair()
    spec = world.specs[0]
    from penstock.cluster.spec import open_host

    host = open_host(spec, far, world._outside(spec))
    host.orphan_s = 30.0
    task = asyncio.get_running_loop().create_task(host.run())
    world.inside._tasks.add(task)
    world.links[0].attach(near)
    await world.links[0].ready()
    return host


def test_another_controller_takes_a_replica_over_and_the_old_requests_are_freed() -> None:
    async def body() -> None:
        world = World(1)
        host = await host_of(world)
        asyncio.create_task(world.fleet.submit(request("a", 500), lambda output: None))
        await asyncio.sleep(3.5)
        assert host.requests() == ("a",)
        fleet, link = second_controller()
        near, far = local.pair()
        host.adopt(far)  # the first one is not even known to be gone
        link.attach(near)
        await link.ready()
        assert host.requests() == () and host.replica.requests() == ("a",), "a step has it"
        heard: list[Output] = []
        await asyncio.sleep(2.0)
        await fleet.submit(request("a", 3), heard.append)
        assert [output.num_tokens for output in heard] == [1, 1, 1]
        await asyncio.sleep(1.0)
        (report,) = fleet.reports()
        assert report.free_blocks == report.total_blocks and not host.replica.requests()
        await fleet.stop()
        await world.inside.stop()

    run(body())


def test_nothing_of_an_old_request_is_told_to_a_new_one_of_the_same_name() -> None:
    async def body() -> None:
        world = World(1)
        host = await host_of(world)
        asyncio.create_task(world.fleet.submit(request("a", 500), lambda output: None))
        await asyncio.sleep(3.5)
        fleet, link = second_controller()
        near, far = local.pair()
        host.adopt(far)
        link.attach(near)
        heard: list[Output] = []
        await link.ready()
        end = await asyncio.gather(
            fleet.submit(request("a", 3), heard.append), return_exceptions=True
        )
        assert heard == [] and "still holds" in str(end[0]), "it is asked again in a moment"
        await fleet.stop()
        await world.inside.stop()

    run(body())


def test_one_that_went_on_elsewhere_may_come_again() -> None:
    """It was on its way here when its controller was lost, and then left without a word: nobody's output told of it."""

    async def body() -> None:
        world = World(1)
        host = await host_of(world)
        host._orphans.add("a")
        heard: list[Output] = []
        async with asyncio.timeout(60):
            await world.fleet.submit(request("a", 3), heard.append)
        assert [output.num_tokens for output in heard] == [1, 1, 1]
        await world.fleet.stop()
        await world.inside.stop()

    run(body())


def test_a_replica_that_nobody_adopts_ends_and_frees_what_it_held_before() -> None:
    async def body() -> None:
        world = World(1)
        host = await host_of(world)
        begun = asyncio.create_task(world.fleet.submit(request("a", 500), lambda output: None))
        await asyncio.sleep(3.5)
        world.links[0].lose("the cable is cut")
        await asyncio.gather(begun, return_exceptions=True)
        await asyncio.sleep(2.0)
        assert host.replica.is_idle and not world.executors[0].is_stopped
        await world.inside.stop()
        assert world.executors[0].is_stopped
        assert 33 < asyncio.get_running_loop().time() < 34.1

    run(body())
