"""Objects that live on the nodes of a Ray cluster. This file and net.ray import ray, which the extra `cluster` brings.

    cluster = RayCluster("auto")                          # or HOST:PORT, ray://HOST:PORT
    group = await cluster.reserve([{"CPU": 2.0}] * 3)     # one bundle each, on different nodes as far as there are any
    actor = cluster.start(Thing, "told", group, index=0)
    await actor.call("method", argument)

Rules
- An actor is never started anew by Ray: whoever started it hears of its end and decides. Its bundle is kept; when its
  node is gone Ray finds it another place, and the next actor of that bundle waits for it.
- Actors end with the process that started them.
- "auto" is a running cluster if there is one, else this machine becomes one, which ends with this process.
- This Penstock travels with the work, as in net.ray; what actors write is told on our stderr by Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from penstock.core.errors import BadConfig, PenstockError, ReplicaLost, missing_extra
from penstock.net.ray import connect

STORE_BYTES = 100_000_000  # of a cluster that is started here: nothing large is ever put into it
Bundle = dict[str, float]


class RayActor:
    """One object on some node."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self._ray, self._handle = ray, handle

    async def call(self, method: str, *arguments: object) -> Any:
        """What the method returns. Raises ReplicaLost when the actor is gone, PenstockError of what it raised."""
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, PenstockError):
                raise cause from None
            raise ReplicaLost(f"its actor failed: {_last_line(error)}") from None
        except self._ray.exceptions.RayError as error:
            raise ReplicaLost(f"its actor is gone: {_first_line(error)}") from None

    def kill(self) -> None:
        self._ray.kill(self._handle, no_restart=True)


class RayCluster:
    """A connection that is closed with `stop`. Connecting blocks: make it before the loop serves anybody."""

    def __init__(self, address: str) -> None:
        try:
            import ray  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ModuleNotFoundError:
            raise missing_extra("ray", "cluster") from None
        self._ray: Any = ray
        self._is_ours = not ray.is_initialized()
        self._groups: list[Any] = []
        if self._is_ours:
            connect(ray, address, starts=True, store_bytes=STORE_BYTES, tells=True)

    def nodes(self) -> list[Bundle]:
        """What each living node has in all."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    async def reserve(self, bundles: Sequence[Bundle], timeout_s: float) -> Any:
        """Set these resources aside. Raises BadConfig when they are not to be had in time."""
        from ray.util.placement_group import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
            placement_group,
        )

        group = placement_group([dict(each) for each in bundles], strategy="SPREAD")
        self._groups.append(group)
        try:
            await asyncio.wait_for(_as_future(group.ready()), timeout_s)
        except TimeoutError:
            self.release(group)
            raise BadConfig(
                f"the Ray cluster did not free {_told(bundles)} in {timeout_s:g} s; "
                f"its nodes have {_told(self.nodes())}",
                hint="ask for fewer replicas, or for less each: serve.ray.cpus, serve.ray.gpus",
            ) from None
        return group

    def release(self, group: Any) -> None:
        from ray.util.placement_group import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
            remove_placement_group,
        )

        self._groups.remove(group)
        remove_placement_group(group)

    def places(self, group: Any) -> dict[int, str]:
        """The node of each bundle, as far as it is known."""
        from ray.util.placement_group import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
            placement_group_table,
        )

        return dict(placement_group_table(group)["bundles_to_node_id"])

    def start(
        self, kind: type, *arguments: object, group: Any, index: int, bundle: Mapping[str, float]
    ) -> RayActor:
        """An object of this kind inside a bundle; it is there when a call answers."""
        from ray.util.scheduling_strategies import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
            PlacementGroupSchedulingStrategy,
        )

        strategy = PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=index
        )
        made = self._ray.remote(
            num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0), max_restarts=0
        )(kind)
        return RayActor(self._ray, made.options(scheduling_strategy=strategy).remote(*arguments))

    def stop(self) -> None:
        for group in list(self._groups):
            self.release(group)
        if self._is_ours:
            self._ray.shutdown()


def node_address() -> str:
    """By which the other nodes reach the one that this actor is on."""
    import ray  # type: ignore[import-not-found, import-untyped, unused-ignore]

    util: Any = ray.util
    return str(util.get_node_ip_address())


async def _as_future(reference: Awaitable[object]) -> object:
    return await reference


def _told(bundles: Sequence[Mapping[str, float]]) -> str:
    def one(bundle: Mapping[str, float]) -> str:
        return " and ".join(f"{bundle.get(name, 0):g} {name}" for name in ("CPU", "GPU"))

    counted = {one(bundle): 0 for bundle in bundles}
    for bundle in bundles:
        counted[one(bundle)] += 1
    return ", ".join(f"{count} x ({what})" for what, count in counted.items())


def _first_line(error: BaseException) -> str:
    told = str(error).strip()
    return told.splitlines()[0] if told else type(error).__name__


def _last_line(error: BaseException) -> str:
    told = str(error).strip()
    return told.splitlines()[-1] if told else type(error).__name__
