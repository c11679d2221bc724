"""A connection that is lost: what was under way arrives in part, and both ends hear of it in their own time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from penstock.core.errors import ReplicaLost
from penstock.sim.cable import Cable
from penstock.sim.loop import run


def lines(body: Callable[[Cable, list[object], list[object]], Awaitable[None]]) -> None:
    async def scenario() -> None:
        cable = Cable(latency_s=1.0, limit=8)
        near: list[object] = []
        far: list[object] = []
        for end, heard in ((cable.near, near), (cable.far, far)):
            end.listen(heard.append)
            end.watch(lambda why, heard=heard: heard.append((why, now())))
        await body(cable, near, far)

    run(scenario())


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_cut_delivers_a_beginning_and_until_it_is_known_what_is_sent_is_lost() -> None:
    async def body(cable: Cable, near: list[object], far: list[object]) -> None:
        for number in range(5):
            assert cable.far.offer(number) and cable.near.offer(number)
        cable.cut(kept=(3, 0), told_at=(4.0, 2.0), why="cut")
        assert cable.near.offer("half-open")
        await asyncio.sleep(3.0)
        assert near == [0, 1, 2] and far == [("cut", 2.0)]
        with pytest.raises(ReplicaLost):
            cable.far.offer("known")
        assert cable.near.offer("still half-open")
        await asyncio.sleep(3.0)
        assert near == [0, 1, 2, ("cut", 4.0)] and far == [("cut", 2.0)]

    lines(body)


def test_an_end_that_stands_still_hears_later_and_is_heard_later_in_order() -> None:
    async def body(cable: Cable, near: list[object], far: list[object]) -> None:
        cable.near.offer("a")
        cable.far.offer("sent before")
        cable.far.stand_still(5.0)
        cable.far.offer("said while it stands")
        await asyncio.sleep(4.0)
        assert far == [] and near == ["sent before"]
        cable.near.offer("b")
        await asyncio.sleep(1.5)
        assert far == ["a", "b"] and near == ["sent before"]
        await asyncio.sleep(1.0)
        assert near == ["sent before", "said while it stands"]

    lines(body)


def test_slow_messages_keep_those_behind_them_in_order() -> None:
    async def body(cable: Cable, near: list[object], far: list[object]) -> None:
        cable.delay(5.0, until=0.5)
        cable.near.offer("slow")
        await asyncio.sleep(1.0)
        cable.near.offer("quick")
        await asyncio.sleep(4.9)
        assert far == []
        await asyncio.sleep(0.2)
        assert far == ["slow", "quick"]

    lines(body)


def test_a_killed_end_hears_nothing_and_whoever_waited_for_room_goes_on() -> None:
    async def body(cable: Cable, near: list[object], far: list[object]) -> None:
        for number in range(8):
            assert cable.near.offer(number)
        assert not cable.near.offer("no room")
        waiting = asyncio.get_running_loop().create_task(cable.near.send("waits"))
        await asyncio.sleep(0)
        cable.kill(cable.far, kept=0, told_at=3.0, why="killed")
        await waiting
        await asyncio.sleep(4.0)
        assert far == [] and near == [("killed", 3.0)]

    lines(body)
