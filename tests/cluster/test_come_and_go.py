"""Replicas that join, leave and come again, as seeds of `penstock bench faults` found them mistreated."""

from __future__ import annotations

import asyncio

from penstock.cluster.fleet import Fleet
from penstock.cluster.keeper import Keeper
from penstock.cluster.link import ReplicaLink
from penstock.cluster.router import Router
from penstock.core.messages import BlockNews, Hello, Say
from penstock.core.types import BlockHash, Report
from penstock.net import local
from penstock.policy import find
from penstock.report.log import Memory
from penstock.sim.loop import run


class Known:
    """A fleet whose router remembers what it is told."""

    def __init__(self, links: list[ReplicaLink]) -> None:
        self.router = Router("fleet", find("route", "least")(), log=Memory(), is_checked=True)
        self.fleet = Fleet("m", links, self.router)
        self.news: list[tuple[str, BlockNews]] = []
        self.router.tell = lambda at, replica, news: self.news.append((replica, news))  # type: ignore[method-assign]


async def speaking(link: ReplicaLink, *messages: object) -> None:
    near, far = local.pair()
    link.attach(near)
    far.listen(lambda message: None)
    for message in messages:
        await far.send(message)
    await asyncio.sleep(0.1)


def test_blocks_of_a_replica_that_joined_later_are_heard_of() -> None:
    async def body() -> None:
        known, link = Known([ReplicaLink("r0")]), ReplicaLink("r1")
        report, news = Report(replica="r1", at=0.0), BlockNews((BlockHash(b"x"),), ())
        await speaking(link, Hello(report))
        known.fleet.join(link)
        link._hear(Say(report, news))
        assert known.news == [("r1", news)]
        await link.stop()

    run(body())


def test_a_replica_that_left_and_says_hello_again_is_a_stranger() -> None:
    async def body() -> None:
        link = ReplicaLink("r0")
        known = Known([link])
        await speaking(link, Hello(Report(replica="r0", at=0.0)))
        link.lose("its process ended")
        await link.stop()
        known.fleet.leave("r0")
        await speaking(link, Hello(Report(replica="r0", at=1.0)))
        assert not known.fleet.reports() and not known.router.outstanding

    run(body())


def test_a_replica_that_was_put_out_while_it_was_to_be_started_again_is_not() -> None:
    async def body() -> None:
        link, launched = ReplicaLink("r0"), 0

        async def launch() -> None:
            nonlocal launched
            launched += 1

        async def until_over() -> str:
            return "ended"

        keeper = Keeper(link, what="process", launch=launch, until_over=until_over, max_restarts=5)
        keeper.begin()
        await asyncio.sleep(0.1)
        await link.stop()
        await asyncio.sleep(60.0)
        assert launched == 0
        keeper.stop()

    run(body())
