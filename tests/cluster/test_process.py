"""Engines in processes of their own: they answer, they die, they come back, and they never outlive their parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from penstock.cluster.fleet import Fleet
from penstock.cluster.link import ReplicaLink
from penstock.cluster.process import EngineProcess, Processes
from penstock.cluster.router import Router
from penstock.cluster.silence import Patience
from penstock.cluster.spec import ReplicaSpec
from penstock.core.errors import BadModel, ReplicaLost
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling
from penstock.policy import find
from penstock.report.log import Null
from tests.cluster.test_link_and_host import POLICIES

WORKER = "tests.cluster.modelled_worker"
ROOT = Path(__file__).parents[2]


class World:
    def __init__(
        self, model: str = "ticks", max_restarts: int = 3, patience: Patience | None = None
    ) -> None:
        self.spec = ReplicaSpec(name="m-0", model=model, policies=POLICIES)
        self.link = ReplicaLink("m-0")
        router = Router("fleet", find("route", "least")(), log=Null())
        self.fleet = Fleet("m", [self.link], router)
        self.processes = Processes(max_restarts=max_restarts, patience=patience, worker=WORKER)

    @property
    def engine(self) -> EngineProcess:
        return self.processes.engines[0]

    def ask(self, name: str, tokens: int, heard: list[Output] | None = None) -> asyncio.Task[None]:
        request = Request(
            id=RequestId(name),
            model="m",
            prompt=TokenPrompt((1, 2, 3)),
            sampling=Sampling(max_tokens=tokens),
        )
        on_output = None if heard is None else heard.append
        return asyncio.create_task(self.fleet.submit(request, on_output))

    def is_alive(self) -> bool:
        return all(report.is_alive for report in self.fleet.reports())


@asynccontextmanager
async def running(model: str = "ticks", max_restarts: int = 3) -> AsyncIterator[World]:
    world = World(model, max_restarts)
    try:
        await world.processes.start(world.spec, world.link)
        yield world
    finally:
        await world.fleet.stop()
        await world.processes.stop()


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def test_it_answers_and_ends_when_told() -> None:
    async with running() as world:
        heard: list[Output] = []
        await world.ask("a", 5, heard)
        assert [token for output in heard for token in output.ids] == [7] * 5
        assert heard[-1].finish == "length"
        assert world.link.about == "ticking"
        pid = world.engine.pid
        assert pid is not None
        await world.fleet.drain()
    assert not is_running(pid)


async def test_signals_for_the_group_are_left_to_the_parent() -> None:
    async with running() as world:
        task = world.ask("a", 20)
        await asyncio.sleep(0.1)
        assert world.engine.pid is not None
        os.kill(world.engine.pid, signal.SIGINT)
        os.kill(world.engine.pid, signal.SIGTERM)
        await task


async def test_a_killed_engine_loses_its_requests_and_is_started_again() -> None:
    async with running() as world:
        heard: list[Output] = []
        begun = world.ask("a", 500, heard)
        await until(lambda: bool(heard))
        pid = world.engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(10.0):
            with pytest.raises(ReplicaLost):
                await begun
        assert not world.is_alive()
        with pytest.raises(ReplicaLost, match="0 are running"):
            await world.ask("b", 5)
        await until(world.is_alive)
        assert world.engine.pid != pid
        await world.ask("c", 5)


async def test_an_engine_that_keeps_dying_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    async with running(max_restarts=1) as world:
        for _ in range(2):
            await until(world.is_alive)
            assert world.engine.pid is not None
            os.kill(world.engine.pid, signal.SIGKILL)
            await until(lambda: not world.is_alive())
        await until(lambda: "given up" in caplog.text)
        assert not world.is_alive()


async def test_an_engine_that_cannot_start_says_why() -> None:
    with pytest.raises(BadModel, match="config.json is missing") as caught:
        async with running("fails"):
            pass
    assert "copy all files" in caught.value.hint


async def test_an_engine_that_ends_without_a_word_is_told_by_its_last_lines() -> None:
    with pytest.raises(ReplicaLost, match="exit code 9") as caught:
        async with running("crashes"):
            pass
    assert "the last words of an engine" in caught.value.hint


async def test_an_engine_that_hangs_while_it_starts_is_ended_and_told() -> None:
    world = World("hangs")
    engine = EngineProcess(
        world.spec, world.link, max_restarts=0, start_timeout_s=1.0, worker=WORKER
    )
    async with asyncio.timeout(20.0):
        with pytest.raises(ReplicaLost, match="was not ready after 1 s") as caught:
            await engine.start()
        assert "serve.start_timeout_s" in caught.value.hint
        pid = engine.pid
        assert pid is not None
        await until(lambda: not is_running(pid))
        await engine.stop()


class Penniless(EngineProcess):
    """On a machine that has no room for one process more, the first `failures` times."""

    failures = 1

    async def _spawn(self) -> asyncio.subprocess.Process:
        if self.failures:
            self.failures -= 1
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return await super()._spawn()


async def test_a_machine_without_room_for_a_process_is_told_and_tried_again() -> None:
    world = World()
    engine = Penniless(world.spec, world.link, max_restarts=1, worker=WORKER)
    with pytest.raises(ReplicaLost, match="Resource temporarily unavailable"):
        await engine.start()
    await engine.start()
    await world.ask("a", 5)
    await world.fleet.stop()
    await engine.stop()


PARENT = """
    import asyncio, os, sys
    from tests.cluster.test_process import World

    async def main():
        world = World()
        await world.processes.start(world.spec, world.link)
        print(world.engine.pid, flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
"""


async def test_an_engine_dies_with_its_parent() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT)], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert parent.stdout is not None
    pid = int(await asyncio.to_thread(parent.stdout.readline))
    assert is_running(pid)
    parent.kill()
    parent.wait()
    await until(lambda: not is_running(pid), 5.0)
    parent.stdout.close()


async def test_an_engine_that_stands_still_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.net.zmq.HEARTBEAT_S", 0.1)
    monkeypatch.setattr("penstock.net.zmq.DEAD_AFTER_S", 0.5)
    async with running() as world:
        task = world.ask("a", 500)
        pid = world.engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ReplicaLost):
            await task
        await until(world.is_alive)
        assert world.engine.pid != pid and not is_running(pid)
        await world.ask("b", 5)


async def test_an_engine_whose_loop_is_stuck_is_suspected_and_replaced() -> None:
    """Its sockets answer all the time: ZeroMQ's own heartbeats come from another thread."""
    world = World("freezes", patience=Patience(suspect_after_s=1.5, lost_after_s=2.5))
    try:
        await world.processes.start(world.spec, world.link)
        task = world.ask("a", 500)
        pid = world.engine.pid
        assert pid is not None
        with pytest.raises(ReplicaLost, match="said nothing"):
            await task
        await until(lambda: not is_running(pid))
    finally:
        await world.fleet.stop()
        await world.processes.stop()
