"""What a modelled link charges. Order, closing and back pressure are held by tests/twins/test_channel.py."""

from __future__ import annotations

import asyncio

import pytest

from penstock.sim.channel import Link, pair
from penstock.sim.loop import run


def arrivals(link: Link, sends: list[tuple[float, int]]) -> list[float]:
    """Send messages of given (instant, bytes); when each was heard."""

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        near, far = pair(link)
        heard: list[float] = []
        far.listen(lambda message: heard.append(loop.time()))
        for at, num_bytes in sends:
            await asyncio.sleep(at - loop.time())
            await near.send("message", num_bytes)
        while len(heard) < len(sends):
            await asyncio.sleep(1.0)
        return heard

    return run(main())


def test_latency_and_bandwidth_by_hand() -> None:
    link = Link(latency_s=0.5, bytes_per_s=100.0)
    # 200 bytes take 2 s; the second waits behind it; the third finds the link idle.
    assert arrivals(link, [(0.0, 200), (1.0, 100), (10.0, 50)]) == [2.5, 3.5, 11.0]


def test_an_ideal_link_takes_no_time() -> None:
    assert arrivals(Link(), [(0.0, 10**9), (3.0, 10**9)]) == [0.0, 3.0]


def test_the_two_directions_do_not_delay_each_other() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        near, far = pair(Link(latency_s=1.0, bytes_per_s=10.0))
        heard: list[float] = []
        far.listen(lambda message: heard.append(loop.time()))
        near.listen(lambda message: heard.append(loop.time()))
        await near.send("there", 50)
        await far.send("back", 10)
        await asyncio.sleep(100)
        return heard

    assert run(main()) == [2.0, 6.0]


def test_an_end_nobody_watched_is_told_to_whoever_watches_later() -> None:
    async def main() -> list[str]:
        near, far = pair(Link(latency_s=1.0))
        near.listen(lambda message: None)
        await far.close()
        await asyncio.sleep(5)
        told: list[str] = []
        near.watch(told.append)
        await asyncio.sleep(5)
        return told

    assert run(main()) == ["the peer closed the channel"]


def test_a_link_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="latency_s"):
        Link(latency_s=-1.0)
