"""A fleet of replicas in virtual time whose tokens depend on every word of their memory, and which can be killed.

Copies between replicas are made when they end: what the source wrote there meanwhile, it wrote into what travels.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.cluster.fleet import Fleet
from penstock.cluster.link import ReplicaLink
from penstock.cluster.movement import MoveBounds
from penstock.cluster.rounds import Rounds
from penstock.cluster.router import Router
from penstock.cluster.sight import Sight
from penstock.cluster.spec import Outside, ReplicaSpec, open_host, policies_of
from penstock.cluster.steering import Steering, Steers
from penstock.core.errors import PenstockError
from penstock.core.events import Event, Opened
from penstock.core.moving import KvCard, Migrated
from penstock.core.plans import Plan
from penstock.core.ports import Runs
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Caps, Output, Request, RequestId, Role, Sampling
from penstock.cost.fitted import Fitted
from penstock.cost.lengths import RecentLengths
from penstock.cost.phases import Phases
from penstock.cost.predict import StepPredictor
from penstock.engine.peers import PeersConfig
from penstock.engine.replica import ReplicaConfig
from penstock.engine.turn import Predictors
from penstock.lab.replay import ReplicaParts
from penstock.policy import find
from penstock.report.log import Memory as Log
from penstock.report.made import MadeReplica, made_of
from penstock.sim.channel import Link, pair
from penstock.sim.transport import Fabric, ModelledTransport
from tests.policy.hashed_model import Hashed, Memory, Reference

SIZE = 4
MODEL = Fitted({"step": 0.01, "token": 1e-4}, name="", digest="", num_layers=1)
LINK = Link(latency_s=2e-4)
POLICIES: dict[str, Any] = {
    "order": {"name": "fcfs"},
    "admit": {"name": "full-fit"},
    "batch": {"name": "vllm-v1", "max_tokens": 32},
    "evict": {"name": "recompute-last"},
    "blocks": {"name": "lru"},
}


def predictors() -> Predictors:
    return Predictors(cost=StepPredictor(MODEL, 3), lengths=RecentLengths())


class MovingMemory(Memory):
    def open(self, plan: Plan) -> None:
        super().open(plan)
        for seq, _, _, state in plan.opened:
            if state is not None:
                self.answers[seq].tokens += state.output_ids
                self.answers[seq].hashes += state.filled


class Moving(Hashed):
    """A Hashed executor whose jobs can be taken out and in."""

    def take_out(self, seq: int, num_output: int) -> tuple[tuple[int, ...], int | None]:
        job = self.memory.answers.get(seq)
        first = 0 if job is None else job.prompt.num_tokens
        return (() if job is None else tuple(job.tokens[first : first + num_output])), 7


class Copying(ModelledTransport):
    """Copies for real, at the end of the modelled time."""

    def __init__(self, fabric: Fabric, card: KvCard, arenas: dict[str, Any]) -> None:
        super().__init__(fabric, card)
        self._arenas = arenas

    spoils = False  # what comes is not what was there

    async def sums(self, blocks: Sequence[int]) -> tuple[int, ...]:
        here = self._arenas[self.card.address]
        return tuple([zlib.crc32(here[:, block].tobytes()) for block in blocks])

    async def pull(self, address: str, runs: Runs) -> None:
        await super().pull(address, runs)
        here, there = self._arenas[self.card.address], self._arenas[address]
        if self.spoils:
            there = there + there.dtype.type(1)
        for theirs, ours, count in runs:
            here[:, ours : ours + count] = there[:, theirs : theirs + count]


@dataclass
class Site:
    """One replica's process, as it were."""

    link: ReplicaLink
    host: Any
    task: asyncio.Task[None]
    transport: Copying


@dataclass
class Asked:
    request: Request
    outputs: list[Output] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    is_cancelled: bool = False
    error: PenstockError | None = None

    @property
    def ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.ids]


class World:
    def __init__(
        self,
        count: int = 3,
        *,
        num_blocks: int = 40,
        seed: int = 0,
        roles: Sequence[Role] = (),
        mover: Any = None,
        policies: dict[str, Any] = POLICIES,
        peers: PeersConfig | None = None,
        **bounds: Any,
    ) -> None:
        self.roles: Sequence[Role] = roles or ("any",) * count
        self.policies = policies
        self.fabric = Fabric(Link(latency_s=1e-4, bytes_per_s=2e4))
        self.arenas: dict[str, Any] = {}
        self.num_blocks, self.seed = num_blocks, seed
        self.log = Log()
        self.asked: dict[str, Asked] = {}
        routes = find("route", "round-robin")()
        cost = Phases(prefill=(0.01, 1e-4, 0.0), decode=(0.01, 0.0, 1e-4))  # of MODEL
        self.peers = peers
        sight = Sight((routes,), cost=cost if mover else None, peers=peers)
        self.router = Router("fleet", routes, log=self.log, is_checked=True, sight=sight)
        steers = Steers(mover=mover)
        steering = Steering(self.router, steers, log=self.log, is_checked=True) if mover else None
        self.links = [ReplicaLink(f"r{place}") for place in range(count)]
        self.sites: dict[str, Site] = {}
        self.fleet = Fleet(
            "m",
            self.links,
            self.router,
            steering=steering,
            moves=MoveBounds(**{"last_blocks": 2, **bounds}),
        )
        self.rounds = Rounds(self.fleet, steering, mover=self.fleet) if steering else None
        self._generation = 0
        self.over: list[Migrated] = []

    async def start(self) -> None:
        for link in self.links:
            await self.bring_up(link)
        if self.rounds is not None:
            self.rounds.start()

    async def bring_up(self, link: ReplicaLink) -> None:
        self._generation += 1
        near, far = pair(LINK)
        caps = Caps(num_layers=3, max_context=self.num_blocks * SIZE, moves_jobs=True)
        executor = Moving(MODEL, caps=caps)
        memory = MovingMemory(self.num_blocks, SIZE, 0, self._generation)
        executor.remember(memory, is_counted=False, seed=self.seed)
        address = f"{link.name}:{self._generation}"
        self.arenas[address] = memory.arena
        card = KvCard(layout="words", address=address, block_size=SIZE, block_bytes=96)
        spec = ReplicaSpec(
            name=link.name,
            model="m",
            policies=self.policies,
            block_size=SIZE,
            is_checked=True,
            report_s=0.02,
            role=self.roles[self.links.index(link)],
            tells=("jobs", "steady") if self.rounds else ("blocks",) if self.peers else (),
            peers=self.peers,
        )
        transport = Copying(self.fabric, card, self.arenas)
        outside = Outside(
            executor=executor,
            num_blocks=self.num_blocks,
            predictors=predictors(),
            log=self.log,
            transport=transport,
        )
        host = open_host(spec, far, outside)
        task = asyncio.create_task(host.run())
        self.sites[link.name] = Site(link, host, task, transport)
        link.attach(near)
        await link.ready()

    def ask(
        self,
        name: str,
        prompt: list[int],
        length: int,
        n: int = 1,
        *,
        priority: int = 0,
        **sampling: Any,
    ) -> Asked:
        request = Request(
            id=RequestId(name),
            model="m",
            prompt=TokenPrompt(prompt),
            n=n,
            priority=priority,
            sampling=Sampling(max_tokens=length, **{"temperature": 0.0, **sampling}),
        )
        asked = self.asked[name] = Asked(request)

        async def serve() -> None:
            try:
                await self.fleet.submit(request, asked.outputs.append)
            except PenstockError as error:
                asked.error = error

        asked.task = asyncio.create_task(serve())
        return asked

    def move(self, name: str, target: str, mode: Any) -> None:
        self.fleet.move(name, target, mode, on_over=self.over.append)

    def cancel(self, name: str) -> None:
        asked = self.asked[name]
        assert asked.task is not None
        if asked.task.cancel():
            asked.is_cancelled = True

    async def kill(self, name: str) -> None:
        """The process is gone: what it had to say is lost, and nobody reads its memory any more."""
        site = self.sites.pop(name)
        await site.transport.close()
        site.link.lose("killed")
        await site.host.stop()
        site.task.cancel()
        await asyncio.gather(site.task, return_exceptions=True)

    async def end(self) -> None:
        """Wait for all; then nothing is held anywhere."""
        tasks = [asked.task for asked in self.asked.values() if asked.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(100.0)
        assert self.fleet.num_outstanding == 0 and not self.fleet.moving
        assert set(self.router.outstanding.values()) <= {0}
        for site in self.sites.values():
            replica = site.host.replica
            assert not site.task.done(), site.task
            assert replica.is_idle and not replica.ledger.tables, (
                f"{replica.config.name} holds something"
            )
            assert not site.host._moves._open, "a movement is not settled"
            assert not replica._moves.joinings._incoming and not replica._moves.joinings._joined
            assert replica.ledger.free == replica.ledger.total
            replica.check()

    async def stop(self) -> None:
        if self.rounds is not None:
            await self.rounds.stop()
        await self.fleet.stop()
        await asyncio.gather(*(site.task for site in self.sites.values()))

    def check_texts(self) -> None:
        for asked in self.asked.values():
            text = Reference(asked.request, 0).ids
            if asked.is_cancelled or asked.error is not None:
                assert asked.ids == text[: len(asked.ids)], asked.request.id
            else:
                assert asked.ids == text, asked.request.id
                assert sum(output.num_tokens for output in asked.outputs) == len(text)
                assert [o.finish for o in asked.outputs if o.finish] == ["length"], asked.request.id

    def parts_of(self, who: str) -> ReplicaParts:
        """What its log is replayed with."""
        (made,) = [made_of(event) for event in self.events_of(who) if isinstance(event, Opened)]
        assert isinstance(made, MadeReplica)
        return ReplicaParts(
            config=ReplicaConfig(
                name=who,
                num_blocks=made.num_blocks,
                block_size=SIZE,
                tells=("blocks",) if self.peers else (),
            ),
            caps=made.caps,
            policies=policies_of(self.policies),
            predictors=predictors(),
        )

    def events_of(self, who: str) -> list[Event]:
        return [event for event in self.log.events if getattr(event, "who", "") == who]
