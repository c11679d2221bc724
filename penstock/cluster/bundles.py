"""What a replica takes of a Ray cluster: cores or cards of one node, and how it divides a node with its neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from penstock.cluster.spec import Neighbours, ReplicaSpec
from penstock.core.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """`address`: "auto", HOST:PORT or ray://HOST:PORT. `cpus`, `gpus`: of one replica.

    None: `executor.tensor_parallel` cards where the cluster has any and the device allows; else `executor.threads`
    cores for each of its processes, or as many as the nodes have for each replica. `reserve_timeout_s`: to find room.
    """

    address: str = "auto"
    cpus: int | None = None
    gpus: int | None = None
    reserve_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not self.address:
            raise ValueError('address may not be empty; "auto" finds a cluster on this machine')
        if not self.reserve_timeout_s > 0:
            raise ValueError(f"reserve_timeout_s must be positive, got {self.reserve_timeout_s}")


def cores_each(nodes: Sequence[float], count: int) -> int:
    """The most cores that each of `count` replicas can have on nodes with so many; 0 = there is no room."""
    cores = int(max(nodes, default=0))
    while cores and sum(int(node // cores) for node in nodes) < count:
        cores -= 1
    return cores


def bundle_of(
    spec: ReplicaSpec, config: RayConfig, nodes: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """What a replica sets aside on its node. Raises BadConfig."""
    executor, count = spec.executor, spec.neighbours.count
    cards = [int(node.get("GPU", 0)) for node in nodes]
    gpus = config.gpus
    if gpus is None:
        wants_cards = executor.device.startswith("cuda") or (
            executor.device == "auto" and any(cards)
        )
        gpus = executor.tensor_parallel if wants_cards else 0
    cpus = config.cpus
    if cpus is None and executor.threads is not None:
        cpus = executor.threads * executor.tensor_parallel
    if cpus is None:
        cpus = 1 if gpus else cores_each([node.get("CPU", 0.0) for node in nodes], count)
    if not cpus and not gpus:
        raise BadConfig(
            f"the nodes of the Ray cluster have no core for each of {count} replicas",
            hint="start fewer replicas, add nodes, or set serve.ray.cpus",
        )
    return {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})}


def seated(spec: ReplicaSpec, bundle: Mapping[str, float], neighbours: Neighbours) -> ReplicaSpec:
    """The spec as it is on its node. Cards are its alone; threads are its cores, where nobody said how many."""
    executor = spec.executor
    if bundle.get("GPU"):
        return replace(spec, neighbours=Neighbours())
    if executor.threads is None:
        threads = max(1, int(bundle["CPU"]) // executor.tensor_parallel)
        executor = replace(executor, threads=threads)
    return replace(spec, executor=executor, neighbours=neighbours)
