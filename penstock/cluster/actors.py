"""Replicas as actors of a Ray cluster: the same host and replica, reached by calls instead of a socket.

    gateway   Actors -> RayActor.call("hear" | "take") <- Polled channel <- ReplicaLink
    a node    Seat: a Mailbox, and behind it what an engine's process holds

Each replica has a bundle of a placement group: CPU cores or cards, all on one node (`bundle_of` says how many); bundles
are spread over the nodes. An actor whose process or node dies is lost when Ray notices, and started again by us
(cluster.keeper) in its old bundle, which Ray moves to another node when its own is gone. The model must be
there under the same path on every node.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from dataclasses import replace
from importlib import import_module
from typing import Any

from penstock.cluster.bundles import RayConfig, bundle_of, seated
from penstock.cluster.keeper import Keeper
from penstock.cluster.link import ReplicaLink
from penstock.cluster.silence import Patience
from penstock.cluster.spec import Neighbours, ReplicaSpec
from penstock.cluster.worker import serve_on
from penstock.core.errors import ReplicaLost
from penstock.core.messages import Message
from penstock.net.codec import Codec
from penstock.net.polled import Mailbox, Polled
from penstock.net.ray_actor import Bundle, RayActor, RayCluster, node_address

STOP_TIMEOUT_S = 5.0
OPENER = "penstock.cluster.worker:open_torch"


class Seat:
    """Runs on a node, inside an actor: one replica behind a mailbox."""

    def __init__(self, name: str, told: str, opener: str) -> None:
        logging.basicConfig(
            level=logging.INFO, format=f"[{name}] %(message)s", stream=sys.stderr, force=True
        )
        spec = ReplicaSpec.from_json(told)
        self._spec = replace(spec, kv=spec.kv.at(node_address())) if spec.kv.reaches_far else spec
        self._opener = opener
        self._mailbox: Mailbox | None = None
        self._serving: asyncio.Task[int] | None = None

    async def begin(self) -> None:
        """Open the mailbox; what comes of the rest is told through it."""
        self._mailbox = Mailbox(Codec(Message))
        self._serving = asyncio.create_task(self._serve(self._mailbox))

    async def _serve(self, mailbox: Mailbox) -> int:
        module, _, function = self._opener.partition(":")
        try:
            return await serve_on(self._spec, mailbox, getattr(import_module(module), function))
        finally:
            await mailbox.close()

    async def hear(self, frames: list[bytes]) -> None:
        assert self._mailbox is not None
        self._mailbox.hear(frames)

    async def end(self) -> None:
        """Return when the replica has ended; whoever asks has told it to."""
        if self._serving is not None:
            await asyncio.wait((self._serving,))

    async def take(self) -> list[bytes]:
        assert self._mailbox is not None
        return await self._mailbox.take()


class SeatedEngine:
    """One replica's actor and its successors."""

    def __init__(self, spec: ReplicaSpec, link: ReplicaLink, actors: Actors, index: int) -> None:
        self.spec, self.link = spec, link
        self._actors, self._index = actors, index
        self._actor: RayActor | None = None
        self.keeper = Keeper(
            link,
            what="engine's actor",
            launch=self.launch,
            until_over=self._until_over,
            max_restarts=actors.max_restarts,
        )

    async def launch(self) -> None:
        actors = self._actors
        actor = self._actor = actors.seat(self.spec, self._index)
        try:
            async with asyncio.timeout(actors.start_timeout_s):
                await actor.call("begin")
                self.link.attach(
                    Polled(
                        Codec(Message),
                        lambda frames: actor.call("hear", frames),
                        lambda: actor.call("take"),
                    )
                )
                await self.link.ready()
        except TimeoutError:
            self._give_up()
            raise ReplicaLost(
                f"the engine's actor of {self.spec.name} was not ready after {actors.start_timeout_s:g} s",
                hint="where it needs longer, set serve.start_timeout_s; its bundle may wait for a node",
            ) from None
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        self.link.lose("it did not start")
        self.kill()

    async def _until_over(self) -> str:
        await self.link.gone()
        self.kill()
        return "is gone"

    def kill(self) -> None:
        if self._actor is not None:
            self._actor.kill()

    async def stop(self) -> None:
        """Give one that was told to stop the time to, and end it."""
        self.keeper.stop()
        if self._actor is not None:
            with contextlib.suppress(ReplicaLost, TimeoutError):
                await asyncio.wait_for(self._actor.call("end"), STOP_TIMEOUT_S)
        self.kill()


class Actors:
    """A cluster.keeper.Runtime. Made before the loop runs, since it connects to the cluster."""

    def __init__(
        self,
        config: RayConfig,
        *,
        max_restarts: int = 5,
        start_timeout_s: float = 600.0,
        patience: Patience | None = None,
        opener: str = OPENER,
    ) -> None:
        self.max_restarts, self.start_timeout_s = max_restarts, start_timeout_s
        self._config, self._opener = config, opener
        self._patience = patience or Patience()
        self._cluster = RayCluster(config.address)
        self._groups: dict[int, tuple[Any, int, Bundle]] = {}  # by engine: group, place in it
        self._lock = asyncio.Lock()
        self._is_begun = False
        self.engines: list[SeatedEngine] = []

    async def start(self, spec: ReplicaSpec, link: ReplicaLink) -> None:
        index = len(self.engines)
        engine = SeatedEngine(spec, link, self, index)
        self.engines.append(engine)
        await asyncio.sleep(0)  # all that start together are known now
        await self._reserve(index)
        link.expect_beats(self._patience)
        await engine.launch()
        engine.keeper.begin()

    async def _reserve(self, index: int) -> None:
        """Those that start together share a group, so that they are spread; one that comes later has its own."""
        async with self._lock:
            if index in self._groups:
                return
            together = [index] if self._is_begun else list(range(len(self.engines)))
            self._is_begun = True
            nodes = self._cluster.nodes()
            bundles = [bundle_of(self.engines[at].spec, self._config, nodes) for at in together]
            group = await self._cluster.reserve(bundles, self._config.reserve_timeout_s)
            for place, at in enumerate(together):
                self._groups[at] = (group, place, bundles[place])

    def seat(self, spec: ReplicaSpec, index: int) -> RayActor:
        group, place, bundle = self._groups[index]
        if spec.neighbours.count > 1:
            spec = replace(spec, kv=spec.kv.on_nodes())
        told = seated(spec, bundle, self._neighbours(group, place)).to_json()
        return self._cluster.start(
            Seat, spec.name, told, self._opener, group=group, index=place, bundle=bundle
        )

    def _neighbours(self, group: Any, place: int) -> Neighbours:
        """Replicas of the group on the same node. Those of other groups are not seen."""
        places = self._cluster.places(group)
        here = sorted(at for at, node in places.items() if node == places.get(place))
        return Neighbours(count=len(here), index=here.index(place)) if here else Neighbours()

    async def stop(self) -> None:
        await asyncio.gather(*(engine.stop() for engine in self.engines))
        await asyncio.to_thread(self._cluster.stop)

    def kill(self) -> None:
        for engine in self.engines:
            engine.keeper.stop()
            engine.kill()
