"""Every replica of a fleet is told of an adapter, also one that starts again; and of its end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from penstock.cluster.fleet import Fleet
from penstock.cluster.fleets import Fleets
from penstock.cluster.inside import Inside
from penstock.cluster.link import ReplicaLink
from penstock.cluster.router import Router
from penstock.cluster.scaling import Scaling
from penstock.cluster.spec import Outside, ReplicaSpec
from penstock.core.errors import BadModel, BadRequest, UnknownModel
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Caps, Output, Request, RequestId, Sampling
from penstock.engine.adapter_folder import CONFIG, WEIGHTS
from penstock.engine.host_adapters import HostAdapters
from penstock.engine.turn import Predictors
from penstock.net import local
from penstock.policy import find, scale
from penstock.report.log import Memory
from penstock.sim.executor import ModelledExecutor
from tests.cluster.test_link_and_host import POLICIES
from tests.engine.test_swap import MODEL


class Reader:
    """Of one replica; the second one finds fault with folders named "bad"."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.known: dict[str, Path] = {}

    def know(self, key: str, folder: Path) -> None:
        self.known[key] = folder

    def check(self, key: str) -> None:
        if self.number == 1 and self.known[key].name == "bad":
            raise BadModel("it is bad", hint="mend it")


class World:
    def __init__(self, slots: int = 1) -> None:
        self.caps = Caps(num_layers=32, max_context=2048, max_adapters=slots)
        self.readers: list[Reader] = []
        self.inside = Inside(self._outside, local.pair)
        self.specs = [ReplicaSpec(name=f"r{i}", model="m", policies=POLICIES) for i in range(2)]
        self.links = [ReplicaLink(one.name) for one in self.specs]
        router = Router("fleet", find("route", "least")(), log=Memory())
        self.fleets = Fleets({"m": Fleet("m", self.links, router)})

    def _outside(self, spec: ReplicaSpec) -> Outside:
        self.readers.append(Reader(len(self.readers)))
        return Outside(
            executor=ModelledExecutor(MODEL, caps=self.caps),
            num_blocks=64,
            predictors=Predictors(cost=None, lengths=None),  # type: ignore[arg-type]
            log=Memory(),
            adapters=self.readers[-1],
        )

    async def start(self) -> None:
        for spec, link in zip(self.specs, self.links, strict=True):
            await self.inside.start(spec, link)

    async def ask(self, name: str, tokens: int = 2) -> list[Output]:
        """Of an adapter, as a gateway asks."""
        heard: list[Output] = []
        found = self.fleets.adapters().get(name)
        request = Request(
            id=RequestId(f"{name}-{id(heard)}"),
            model="m",
            prompt=TracedPrompt(8),
            sampling=Sampling(max_tokens=tokens),
            adapter=name if found is None else found.key,
        )
        await asyncio.wait_for(self.fleets.submit(request, heard.append), 20)
        return heard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        for file in (CONFIG, WEIGHTS):
            (tmp_path / name / file).write_text(name)
    return tmp_path / "good"


async def test_loaded_everywhere_and_unloaded(folder: Path) -> None:
    world = World()
    await world.start()
    with pytest.raises(BadRequest, match="no adapter 'sql' here"):
        await world.ask("sql")
    await world.fleets.load_adapter("sql", str(folder))
    key = world.fleets.adapters()["sql"].key
    assert [reader.known for reader in world.readers] == [{key: folder}] * 2
    assert (await world.ask("sql"))[-1].finish == "length"
    with pytest.raises(BadRequest, match="something called 'sql' already"):
        await world.fleets.load_adapter("sql", str(folder))
    with pytest.raises(BadRequest, match="something called 'm' already"):
        await world.fleets.load_adapter("m", str(folder))
    running = asyncio.ensure_future(world.ask("sql", 20))
    await asyncio.sleep(0.01)
    world.fleets.unload_adapter("sql")
    assert (await running)[-1].finish == "length"
    with pytest.raises(UnknownModel):
        world.fleets.unload_adapter("sql")
    with pytest.raises(BadRequest, match="no adapter"):
        await world.ask(key)
    await world.fleets.stop()


async def test_one_that_a_replica_refuses_is_nowhere(folder: Path) -> None:
    world = World()
    await world.start()
    bad = str(folder.parent / "bad")
    with pytest.raises(BadModel, match="it is bad"):
        await world.fleets.load_adapter("sql", bad)
    assert not world.fleets.adapters()
    with pytest.raises(BadRequest, match="no adapter"):
        await world.ask(next(iter(world.readers[0].known)))
    await world.fleets.load_adapter("sql", str(folder))
    assert (await world.ask("sql"))[-1].finish == "length"
    await world.fleets.stop()


async def test_a_replica_that_starts_again_is_told_again(folder: Path) -> None:
    world = World()
    await world.start()
    await world.fleets.load_adapter("sql", str(folder))
    for link in world.links:
        link.lose("for the test")
    await world.fleets.load_adapter("late", str(folder))  # nobody is there to ask
    await world.start()
    assert (await world.ask("sql"))[-1].finish == "length"
    assert (await world.ask("late"))[-1].finish == "length"
    assert [len(reader.known) for reader in world.readers[2:]] == [2, 2]
    await world.fleets.stop()


async def test_a_fleet_without_room_for_adapters_says_so(folder: Path) -> None:
    world = World(slots=0)
    await world.start()
    with pytest.raises(BadRequest, match="served without adapters"):
        await world.fleets.load_adapter("sql", str(folder))
    await world.fleets.stop()


async def test_a_replica_that_joins_later_knows_what_the_others_know(folder: Path) -> None:
    world = World()
    await world.start()
    await world.fleets.load_adapter("sql", str(folder))
    fleet = world.fleets.fleet("m")
    scaling = Scaling(fleet, world.inside.start, world.specs[0], 2)
    scaling.carry_out(scale.Decision(add={"any": 1}))
    async with asyncio.timeout(10):
        while len(fleet.reports()) < 3:
            await asyncio.sleep(0.01)
    for name in ("r0", "r1"):  # so that only the new one is left
        await fleet.drain_replica(name)
    assert (await world.ask("sql"))[-1].finish == "length"
    world.fleets.unload_adapter("sql")
    await world.fleets.stop()


async def test_a_request_right_behind_an_adapter_is_not_refused(folder: Path) -> None:
    """Both may be heard in one turn: of a successor, which is told of adapters when it greets."""
    adapters = HostAdapters(slots=1, reader=Reader(0))
    reading = adapters.take("sql@1", folder)
    adapters.refuse_if_unknown(
        Request(id=RequestId("a"), model="m", prompt=TracedPrompt(8), adapter="sql@1")
    )
    await reading
