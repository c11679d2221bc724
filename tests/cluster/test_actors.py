"""Replicas on a Ray cluster: what they take of it, and what becomes of them when a node dies."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from penstock.assemble import assemble, load_config, process_leaves
from penstock.cluster.actors import Actors
from penstock.cluster.bundles import RayConfig, bundle_of, cores_each, seated
from penstock.cluster.fleet import Fleet
from penstock.cluster.link import ReplicaLink
from penstock.cluster.router import Router
from penstock.cluster.spec import ExecutorSpec, Neighbours, ReplicaSpec
from penstock.core.errors import BadConfig, BadModel, MissingExtra, ReplicaLost
from penstock.core.moving import Migrated
from penstock.core.ports import MovingPort
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling
from penstock.policy import find
from penstock.report.log import Null
from tests.cluster.test_link_and_host import POLICIES
from tests.cluster.test_process import until
from tests.serve.test_serve import needs_model

ROOT = Path(__file__).parents[2]
OPENER = "tests.cluster.modelled_worker:open_ticking"
CONFIG = RayConfig()


def spec(index: int = 0, count: int = 2, model: str = "ticks", **executor: object) -> ReplicaSpec:
    return ReplicaSpec(
        name=f"m-{index}",
        model=model,
        policies=POLICIES,
        executor=ExecutorSpec(**executor),  # type: ignore[arg-type]
        neighbours=Neighbours(count=count, index=index),
    )


@pytest.mark.parametrize(
    "nodes, count, cores",
    [
        ([8.0], 2, 4),
        ([8.0], 3, 2),
        ([6.0, 2.0], 2, 3),
        ([4.0, 4.0], 1, 4),
        ([1.0], 2, 0),
        ([], 1, 0),
    ],
)
def test_nodes_are_divided(nodes: list[float], count: int, cores: int) -> None:
    assert cores_each(nodes, count) == cores


def test_a_bundle_is_what_the_plan_says() -> None:
    cpu, gpu = {"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}
    assert bundle_of(spec(), CONFIG, [cpu]) == {"CPU": 4.0}
    assert bundle_of(spec(threads=3, tensor_parallel=2), CONFIG, [cpu]) == {"CPU": 6.0}
    assert bundle_of(spec(tensor_parallel=2), CONFIG, [cpu, gpu]) == {"CPU": 1.0, "GPU": 2.0}
    assert bundle_of(spec(device="cpu"), CONFIG, [gpu]) == {"CPU": 4.0}
    assert bundle_of(spec(), RayConfig(cpus=2, gpus=1), [gpu]) == {"CPU": 2.0, "GPU": 1.0}
    with pytest.raises(BadConfig, match="no core for each of 9"):
        bundle_of(spec(count=9), CONFIG, [cpu])


def test_threads_are_the_cores_of_the_bundle() -> None:
    both = Neighbours(count=2, index=1)
    found = seated(spec(tensor_parallel=2), {"CPU": 6.0}, both)
    assert (found.executor.threads, found.neighbours) == (3, both)
    assert seated(spec(threads=5), {"CPU": 6.0}, both).executor.threads == 5
    found = seated(spec(), {"CPU": 1.0, "GPU": 1.0}, both)
    assert (found.executor.threads, found.neighbours) == (None, Neighbours())


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match="cluster"):
        Actors(CONFIG)


class World:
    def __init__(self, count: int, model: str = "ticks", **more: object) -> None:
        self.specs = [spec(index, count, model) for index in range(count)]
        self.links = [ReplicaLink(each.name) for each in self.specs]
        self.fleet = Fleet("m", self.links, Router("fleet", find("route", "least")(), log=Null()))
        self.actors = Actors(RayConfig(reserve_timeout_s=10.0), opener=OPENER, **more)  # type: ignore[arg-type]

    async def start(self) -> None:
        pairs = zip(self.specs, self.links, strict=True)
        await asyncio.gather(*(self.actors.start(*pair) for pair in pairs))

    async def stop(self) -> None:
        await self.fleet.stop()
        await self.actors.stop()

    def ask(self, name: str, tokens: int, heard: list[Output]) -> asyncio.Task[None]:
        request = Request(
            id=RequestId(name),
            model="m",
            prompt=TokenPrompt((1, 2, 3)),
            sampling=Sampling(max_tokens=tokens),
        )
        return asyncio.create_task(self.fleet.submit(request, heard.append))

    def num_alive(self) -> int:
        return sum(report.is_alive for report in self.fleet.reports())


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """A head without cores, and what nodes a test adds; all on this machine."""
    ray = pytest.importorskip("ray", reason="ray is not installed (extra `cluster`)")
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": 100_000_000,
            "include_dashboard": False,
            "_system_config": {"health_check_period_ms": 500, "health_check_timeout_ms": 1000},
        },
    )
    ray.init(
        address=made.address,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_node_is_lost_and_its_replica_comes_back_elsewhere(cluster) -> None:
    """One request a node: the one on the dead node is lost with words, the other goes on, and no token comes twice."""
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100_000_000) for _ in range(2)]
    world = World(2)
    await world.start()
    heard: list[list[Output]] = [[], []]
    tasks = [world.ask(name, 1500, heard[i]) for i, name in enumerate("ab")]
    await until(lambda: all(heard))
    cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    cluster.remove_node(nodes[0], allow_graceful=False)
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION, timeout=40)
    (lost,) = done
    assert isinstance(lost.exception(), ReplicaLost)
    assert world.num_alive() == 1
    await until(lambda: world.num_alive() == 2, 60.0)
    (going,) = set(tasks) - done
    await asyncio.wait_for(going, 60.0)
    whole = heard[tasks.index(going)]
    assert [token for output in whole for token in output.ids] == [7] * 1500
    last: list[Output] = []
    await world.ask("c", 5, last)
    assert [token for output in last for token in output.ids] == [7] * 5
    await world.stop()


@pytest.mark.slow
async def test_a_model_that_cannot_be_read_and_a_cluster_that_is_full_are_told(cluster) -> None:
    cluster.add_node(num_cpus=2, object_store_memory=100_000_000)
    world = World(1, "fails")
    with pytest.raises(BadModel, match="config.json is missing"):
        await world.start()
    await world.stop()
    world = World(40)
    with pytest.raises(BadConfig, match="no core for each of 40"):
        await world.start()
    await world.stop()


def test_lending_is_refused_before_a_cluster_is_looked_for() -> None:
    flags = {"fleet.0.replicas": 2, "fleet.0.lends": True, "serve.ray": {"address": "nowhere:1"}}
    with pytest.raises(BadConfig, match="replicas of one machine"):
        process_leaves(load_config(flags=flags))


@pytest.mark.slow
@needs_model
@pytest.mark.parametrize("kind", ["tcp", "auto"])
@pytest.mark.timeout(400)
async def test_a_request_moves_between_engines_on_two_nodes(cluster, kind: str) -> None:
    """tcp: no memory is shared. auto: nodes of one machine read each other's. The words are those of one replica."""
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    flags = {
        "fleet.0.replicas": 2,
        "serve.ray": {"address": cluster.address},
        "net.kv": {"kind": kind},
    }
    config = load_config(sets=["fleet.0.cache.num_blocks=200"], flags=flags)
    leaves, _ = process_leaves(config)
    service = await assemble(config, leaves)
    try:
        fleet = service.fleet("default")
        card = cast(MovingPort, fleet.port("default-0")).kv
        assert card is not None and card.address.startswith("tcp:" if kind == "tcp" else "either:")
        whole = await written(fleet, "a", moves=False)
        assert await written(fleet, "b", moves=True) == whole and len(whole) == 60
    finally:
        await service.stop()


async def written(fleet: Fleet, name: str, *, moves: bool, tokens: int = 60) -> list[int]:
    over: list[Migrated] = []
    ids: list[int] = []

    def hear(output: Output) -> None:
        ids.extend(output.ids)
        if moves and len(ids) == 5:
            here = fleet.holders()[name]
            other = next(each.replica for each in fleet.reports() if each.replica != here)
            fleet.move(name, other, "blocking", on_over=over.append)

    request = Request(
        id=RequestId(name),
        model="default",
        prompt=TokenPrompt([7 * at % 3000 for at in range(1, 200)], salt=name),
        sampling=Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True),
    )
    await fleet.submit(request, hear)
    assert [each.outcome for each in over] == ["committed"] * moves, over
    assert not moves or over[0].num_blocks >= 12
    return ids


@pytest.mark.slow
@needs_model
@pytest.mark.timeout(400)
async def test_a_stream_goes_on_when_its_node_is_lost(cluster) -> None:
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100_000_000) for _ in range(2)]
    flags = {"fleet.0.replicas": 2, "serve.ray": {"address": cluster.address}}
    sets = ["fleet.0.cache.num_blocks=200", 'fleet.0.policy.route="round-robin"']
    config = load_config(sets=sets, flags=flags)
    leaves, _ = process_leaves(config)
    service = await assemble(config, leaves)
    try:
        fleet = service.fleet("default")
        whole = await written(fleet, "w", moves=False, tokens=400)
        told = [
            asyncio.ensure_future(written(fleet, name, moves=False, tokens=400)) for name in "ab"
        ]
        await until(lambda: len({*fleet.holders().values()}) == 2)
        await until(lambda: all(each.is_heard for each in fleet._tickets.values()))
        assert len(fleet.holders()) == 2, "both are under way"
        cluster.remove_node(nodes[0], allow_graceful=False)
        assert await asyncio.wait_for(asyncio.gather(*told), 60.0) == [whole, whole]
        await until(lambda: sum(report.is_alive for report in fleet.reports()) == 1, 60.0)
    finally:
        await service.stop()
