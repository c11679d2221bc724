"""A server whose engine outlives it: `python -m tests.cluster.outliving_server FOLDER`. It says its engine's process
when one request was answered and another one is being written, and waits to be killed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from penstock.cluster.deployment import Outlive
from penstock.cluster.fleet import Fleet
from penstock.cluster.link import ReplicaLink
from penstock.cluster.process import Processes
from penstock.cluster.router import Router
from penstock.cluster.spec import ReplicaSpec
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling
from penstock.policy import find
from penstock.report.log import Null
from tests.cluster.modelled_worker import __name__ as WORKER
from tests.cluster.test_link_and_host import POLICIES

SPEC = ReplicaSpec(name="m-0", model="ticks", policies=POLICIES)
PROMPT = tuple(range(100))


def outlive(folder: Path, for_s: float = 30.0) -> Outlive:
    return Outlive(name="d", for_s=for_s, folder=folder)


class Controller:
    """One server: a fleet of one engine."""

    def __init__(self, folder: Path, spec: ReplicaSpec = SPEC, for_s: float = 30.0) -> None:
        self.spec, self.link = spec, ReplicaLink(spec.name)
        self.fleet = Fleet("m", [self.link], Router("fleet", find("route", "least")(), log=Null()))
        self.processes = Processes(max_restarts=3, worker=WORKER, outlive=outlive(folder, for_s))

    @property
    def pid(self) -> int:
        pid = self.processes.engines[0].pid
        assert pid is not None
        return pid

    async def start(self) -> None:
        await self.processes.start(self.spec, self.link)

    async def ask(self, name: str, tokens: int, heard: list[Output]) -> None:
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        asked = Request(
            id=RequestId(name), model="m", prompt=TokenPrompt(PROMPT), sampling=sampling
        )
        await self.fleet.submit(asked, heard.append)

    async def stop(self) -> None:
        await self.fleet.stop()
        await self.processes.stop()


async def main(folder: Path) -> None:
    server = Controller(folder)
    await server.start()
    heard: list[Output] = []
    await server.ask("a", 3, heard)
    going = asyncio.create_task(server.ask("b", 3000, heard))
    while len(heard) < 6:
        await asyncio.sleep(0.01)
    sys.stdout.write(f"{server.pid}\n")
    sys.stdout.flush()
    await going


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
