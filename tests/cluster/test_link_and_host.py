"""Fleet, link, channel, host and replica together in virtual time: the whole path but for processes."""

from __future__ import annotations

import asyncio

import pytest

from penstock.cluster.fleet import Fleet
from penstock.cluster.inside import Inside
from penstock.cluster.link import ReplicaLink
from penstock.cluster.router import Router
from penstock.cluster.spec import Outside, ReplicaSpec
from penstock.core.config import Table
from penstock.core.errors import (
    BadRequest,
    ContextTooLong,
    Overloaded,
    ReplicaLost,
    SchemaMismatch,
    StepFailed,
)
from penstock.core.events import Finished, Reported
from penstock.core.messages import Failed, Hello, Say, Submit
from penstock.core.prompt import HashedPrompt, TracedPrompt
from penstock.core.types import Output, Report, Request, RequestId, Sampling
from penstock.engine.turn import Predictors
from penstock.net import local
from penstock.policy import find
from penstock.report.log import Memory
from penstock.sim.loop import run
from tests.engine.steady import SteadyExecutor

POLICIES = {
    "order": Table(name="fcfs"),
    "admit": Table(name="full-fit"),
    "batch": Table(name="vllm-v1"),
    "evict": Table(name="recompute-last"),
    "blocks": Table(name="lru"),
}


def request(name: str, output: int = 3, n: int = 1, prompt: object = None) -> Request:
    return Request(
        id=RequestId(name),
        model="m",
        prompt=prompt or HashedPrompt(8),  # type: ignore[arg-type]
        sampling=Sampling(max_tokens=output),
        n=n,
    )


class World:
    """A fleet of real replicas on steady executors in one process."""

    def __init__(self, count: int = 2, **spec: object) -> None:
        self.log = Memory()
        self.executors: list[SteadyExecutor] = []
        self.inside = Inside(self._outside, local.pair)
        self.specs = [
            ReplicaSpec(name=f"r{i}", model="m", policies=POLICIES, is_checked=True, **spec)  # type: ignore[arg-type]
            for i in range(count)
        ]
        self.links = [ReplicaLink(one.name) for one in self.specs]
        self.router = Router("fleet", find("route", "least")(), log=self.log, is_checked=True)
        self.fleet = Fleet("m", self.links, self.router)

    def _outside(self, spec: ReplicaSpec) -> Outside:
        self.executors.append(SteadyExecutor())
        nothing = Predictors(cost=None, lengths=None)  # type: ignore[arg-type]
        return Outside(
            executor=self.executors[-1],
            num_blocks=64,
            predictors=nothing,
            log=self.log,
            about="steady",
        )

    async def start(self) -> World:
        for spec, link in zip(self.specs, self.links, strict=True):
            await self.inside.start(spec, link)
        return self

    async def stop(self) -> None:
        await self.fleet.stop()
        await self.inside.stop()

    @property
    def finished(self) -> list[Finished]:
        return [event for event in self.log.events if isinstance(event, Finished)]


def test_requests_are_answered_token_by_token_and_spread() -> None:
    async def body() -> None:
        world = await World().start()
        heard: dict[str, list[Output]] = {name: [] for name in "abcd"}
        asked = (world.fleet.submit(request(name), heard[name].append) for name in heard)
        await asyncio.gather(*asked)
        for outputs in heard.values():
            assert [o.num_tokens for o in outputs] == [1, 1, 1]
            assert [o.finish for o in outputs] == [None, None, "length"]
        assert {event.who for event in world.finished} == {"r0", "r1"}
        assert world.links[0].about == "steady"
        await world.fleet.drain()
        await world.stop()
        assert all(executor.is_stopped for executor in world.executors)

    run(body())


def test_without_a_listener_only_the_end_travels() -> None:
    async def body() -> None:
        world = await World(1).start()
        link = world.links[0]
        heard: list[Output] = []
        ended = asyncio.Event()

        def hear(output: Output) -> None:
            heard.append(output)
            if len(heard) == 2:
                ended.set()

        link.submit(Submit(request("a", 5, n=2), every_token=False), hear, pytest.fail)
        await ended.wait()
        assert sorted((o.answer, o.num_tokens, o.finish) for o in heard) == [
            (0, 5, "length"),
            (1, 5, "length"),
        ]
        await world.stop()

    run(body())


def test_cancelling_frees_the_blocks_within_a_step() -> None:
    async def body() -> None:
        world = await World(1).start()
        task = asyncio.create_task(world.fleet.submit(request("a", 500)))
        await asyncio.sleep(3.5)
        assert world.fleet.reports()[0].num_running == 1
        task.cancel()
        await asyncio.sleep(1.0)  # one step of the steady executor
        await asyncio.sleep(0.2)  # and a report
        (report,) = world.fleet.reports()
        assert report.num_running == 0 and report.free_blocks == report.total_blocks
        assert [event.reason for event in world.finished] == ["cancelled"]
        assert world.fleet.num_outstanding == 0
        await world.stop()

    run(body())


def test_refusals_keep_their_class_and_advice() -> None:
    async def body() -> None:
        world = await World(2, max_waiting=1).start()
        with pytest.raises(ContextTooLong, match="1024") as caught:
            await world.fleet.submit(request("long", prompt=HashedPrompt(1024)))
        assert caught.value.param == "prompt"
        many = (world.fleet.submit(request(name)) for name in "abcdefgh")
        ends = await asyncio.gather(*many, return_exceptions=True)
        refused = [end for end in ends if end is not None]
        assert refused and len(refused) < len(ends)
        for end in refused:
            assert isinstance(end, Overloaded) and end.retry_after_s
        with pytest.raises(BadRequest, match="divide"):
            await world.fleet.submit(
                request("odd", prompt=TracedPrompt(90, (1, 2), traced_size=40))
            )
        await world.fleet.submit(request("fine"))
        await world.stop()

    run(body())


def test_reports_come_only_while_something_happens_and_not_too_often() -> None:
    async def body() -> None:
        world = await World(1, report_s=2.0).start()
        await asyncio.sleep(100)
        assert sum(isinstance(event, Reported) for event in world.log.events) == 1  # the hello
        await world.fleet.submit(request("a", 10), lambda output: None)  # ten steps of a second
        await asyncio.sleep(100)
        reports = [event for event in world.log.events if isinstance(event, Reported)]
        gaps = [b.at - a.at for a, b in zip(reports, reports[1:], strict=False)]
        assert 5 <= len(reports) <= 8 and min(gaps) >= 2.0
        assert reports[-1].report.num_running == 0
        await world.stop()

    run(body())


def test_a_channel_that_closes_loses_the_replica_and_a_new_one_brings_it_back() -> None:
    async def body() -> None:
        world = await World(1).start()
        begun = asyncio.create_task(world.fleet.submit(request("a", 50), lambda output: None))
        await asyncio.sleep(5.5)
        await world.links[0]._channel.close()  # type: ignore[union-attr]
        world.links[0].lose("the cable is cut")
        with pytest.raises(ReplicaLost, match="cable"):
            await begun
        assert [report.is_alive for report in world.fleet.reports()] == [False]
        with pytest.raises(ReplicaLost, match="0 are running"):
            await world.fleet.submit(request("b"))
        await world.inside.stop()  # the far end noticed by itself
        await world.inside.start(world.specs[0], world.links[0])
        assert [report.is_alive for report in world.fleet.reports()] == [True]
        await world.fleet.submit(request("c"))
        await world.stop()

    run(body())


def test_a_replica_that_cannot_start_says_why() -> None:
    async def body() -> None:
        near, far = local.pair()
        link = ReplicaLink("r0")
        link.attach(near)
        await far.send(Failed("BadModel", "config.json is missing", "copy it"))
        with pytest.raises(Exception, match="config.json is missing") as caught:
            await link.ready()
        assert type(caught.value).__name__ == "BadModel" and caught.value.hint == "copy it"  # type: ignore[attr-defined]

    run(body())


def test_a_replica_of_another_schema_is_refused_by_who_waits_for_it() -> None:
    async def body() -> None:
        near, far = local.pair()
        link = ReplicaLink("r0")
        link.attach(near)
        await far.send(Hello(Report(replica="r0", at=0.0), schema=99))
        with pytest.raises(SchemaMismatch, match="replica r0 has schema version 99"):
            await link.ready()
        assert not link.is_alive

    run(body())


def test_what_a_lost_replica_had_said_before_does_not_revive_it() -> None:
    async def body() -> None:
        near, far = local.pair()
        link, heard = ReplicaLink("r0"), []
        link.attach(near)
        link.listen(heard.append)
        await far.send(Hello(Report(replica="r0", at=0.0)))
        await link.ready()
        await far.send(Say(Report(replica="r0", at=1.0)))
        link.lose("somebody pulled the plug")
        await asyncio.sleep(1)
        assert [report.is_alive for report in heard] == [True, False]

    run(body())


def test_a_replica_that_breaks_fails_its_requests_and_its_run() -> None:
    async def body() -> None:
        world = await World(1).start()
        task = asyncio.create_task(world.fleet.submit(request("a", 50)))
        await asyncio.sleep(2.5)
        executor = world.executors[0]
        executor.launch = lambda *args: 1 / 0  # type: ignore[assignment, method-assign]
        with pytest.raises((ReplicaLost, StepFailed)):
            await task
        assert [report.is_alive for report in world.fleet.reports()] == [False]
        with pytest.raises(ZeroDivisionError):
            await world.inside.stop()

    run(body())
