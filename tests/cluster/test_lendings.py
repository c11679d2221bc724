"""Replicas in processes of their own keep blocks for each other: a request longer than one memory, and its end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.fleet import Fleet
from penstock.cluster.link import ReplicaLink
from penstock.cluster.process import Processes
from penstock.cluster.router import Router
from penstock.cluster.spec import ExecutorSpec, Neighbours, ReplicaSpec
from penstock.core.errors import ContextTooLong, PenstockError
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling
from penstock.lab.replay import replay_log
from penstock.policy import find
from penstock.report.log import Memory as Log
from tests.engine.torch.models import saved

BLOCKS = 16  # of 16 positions, a replica
POLICIES: dict[str, Any] = {
    "order": {"name": "fcfs"},
    "admit": {"name": "watermark"},
    "batch": {"name": "vllm-v1", "max_tokens": 64},
    "evict": {"name": "recompute-last"},
    "blocks": {"name": "lru"},
}
LONG = [3 + (11 * at) % 500 for at in range(360)]


class World:
    def __init__(self, model: str, count: int, num_blocks: int, logs: Path) -> None:
        self.links = [ReplicaLink(f"m-{at}") for at in range(count)]
        self.specs = [
            ReplicaSpec(
                name=link.name,
                model=model,
                policies=POLICIES,
                num_blocks=num_blocks,
                executor=ExecutorSpec(device="cpu", dtype="fp32", threads=1),
                neighbours=Neighbours(count=max(2, count), index=at),
                lends=count > 1,
                is_checked=True,
                report_s=0.02,
                log_dir=logs,
            )
            for at, link in enumerate(self.links)
        ]
        self.log = Log()
        router = Router("fleet", find("route", "round-robin")(), log=self.log)
        self.fleet = Fleet("m", self.links, router)
        self.processes = Processes(max_restarts=0)

    async def ask(self, name: str, ids: list[int], tokens: int) -> list[int]:
        request = Request(
            id=RequestId(name),
            model="m",
            prompt=TokenPrompt(ids),
            sampling=Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True),
        )
        heard: list[Output] = []
        await self.fleet.submit(request, heard.append)
        assert heard[-1].finish == "length"
        return [token for output in heard for token in output.ids]

    async def lent(self) -> None:
        """Some blocks are away."""
        async with asyncio.timeout(20):
            while not any(report.away_blocks for report in self.fleet.reports()):
                await asyncio.sleep(0.01)

    def is_decoding(self) -> bool:
        return any(report.num_decoding for report in self.fleet.reports())

    async def settled(self) -> None:
        """All blocks are free again at all ends."""
        async with asyncio.timeout(20):
            while not all(self._is_empty(link.name) for link in self.links):
                await asyncio.sleep(0.02)

    def _is_empty(self, name: str) -> bool:
        (report,) = [each for each in self.fleet.reports() if each.replica == name]
        if not report.is_alive:
            return True
        is_free = report.free_blocks == report.total_blocks
        return is_free and not report.lent_blocks and not report.away_blocks


@asynccontextmanager
async def running(root: Path, count: int, num_blocks: int = BLOCKS) -> AsyncIterator[World]:
    world = World(str(saved(root, "llama-8")[0]), count, num_blocks, root / f"logs-{count}")
    try:
        pairs = zip(world.specs, world.links, strict=True)
        await asyncio.gather(*(world.processes.start(spec, link) for spec, link in pairs))
        yield world
    finally:
        await world.fleet.stop()
        await world.processes.stop()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.slow
async def test_a_request_longer_than_one_memory(root: Path) -> None:
    """Text as on one big replica; nothing is left; a creditor that dies ends it with an error."""
    short = [9, 8, 7, 6, 5]
    async with running(root, 1, 64) as world:
        alone = await world.ask("a", LONG, 24), await world.ask("b", short, 24)
        middle = await world.ask("f", LONG[:150], 80)
    async with running(root, 3) as world:
        for turn in range(2):  # the second time from another home
            found = await asyncio.gather(
                world.ask(f"a{turn}", LONG, 24), world.ask(f"b{turn}", short, 24)
            )
            assert tuple(found) == alone
            await world.settled()
        with pytest.raises(ContextTooLong, match="blocks are missing"):
            await world.ask("c", LONG * 3, 24)
        await world.settled()
        task = asyncio.create_task(world.ask("e", LONG, 100))
        await world.lent()
        task.cancel()
        await world.settled()
        running_one = asyncio.create_task(world.ask("f", LONG[:150], 80))
        async with asyncio.timeout(20):
            while not (holders := world.fleet.holders()) or not world.is_decoding():
                await asyncio.sleep(0.01)
        creditor = next(link.name for link in world.links if link.name != holders["f"])
        world.fleet.lend("f", creditor, 5)
        await world.lent()
        async with asyncio.timeout(20):  # and some of it comes home, when there is room
            while dict(world.fleet.lent()["f"]) == {creditor: 5}:
                world.fleet.recall("f", creditor, 1)
                await asyncio.sleep(0.01)
        assert await running_one == middle
        await world.settled()
        task = asyncio.create_task(world.ask("d", LONG, 100))
        await world.lent()
        home = next(report.replica for report in world.fleet.reports() if report.away_blocks)
        for engine, link in zip(world.processes.engines, world.links, strict=True):
            report = next(each for each in world.fleet.reports() if each.replica == link.name)
            if link.name != home and report.lent_blocks:
                assert engine.pid is not None
                os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(PenstockError, match="is gone"):
            await asyncio.wait_for(task, 20)
        await world.settled()
    for path in sorted((root / "logs-3").glob("m-*")):
        for outcome in await asyncio.to_thread(replay_log, path):
            assert outcome.difference is None and outcome.num_decisions, outcome
