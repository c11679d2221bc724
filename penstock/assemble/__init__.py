"""From a configuration and leaves to a running service: the only room that knows every other.

    config        the tree of tables          presets       the policies that fill its slots
    print_config  the tree as TOML            leaves        what is real and what is modelled
    serving       a configuration as an HTTP server, until it is told to stop

`serve` and `simulate` both end in `assemble(config, leaves)`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from penstock.assemble.adapters import adapters_of, rank_of, slots_of
from penstock.assemble.config import Config, FleetConfig, load_config
from penstock.assemble.leaves import Leaves, modelled_leaves, process_leaves
from penstock.assemble.presets import guessing, policy_tables
from penstock.assemble.print_config import print_config
from penstock.assemble.sights import sight_of, tells_of
from penstock.assemble.steer import made_fleet, rounds_of, steering_of
from penstock.cluster.fleet import Fleet
from penstock.cluster.fleets import Fleets
from penstock.cluster.link import ReplicaLink
from penstock.cluster.rounds import Rounds
from penstock.cluster.router import Router
from penstock.cluster.spec import FLEET_SLOTS, Neighbours, ReplicaSpec, policy_of
from penstock.core.adapters import Adapter
from penstock.core.clock import now
from penstock.core.errors import BadConfig
from penstock.core.ports import Log
from penstock.policy import route
from penstock.policy.route.by_stage import ByStage
from penstock.report.made import opened

__all__ = [
    "Config", "FleetConfig", "Leaves", "assemble", "load_config", "modelled_leaves", "print_config", "process_leaves",
]  # fmt: skip


async def assemble(config: Config, leaves: Leaves) -> Fleets:
    """Bring up every replica of every fleet and return when all answer. Raises what one of them says it lacks."""
    by_name: dict[str, Fleet] = {}
    starting: list[tuple[ReplicaSpec, ReplicaLink]] = []
    text = print_config(config)
    adapters: dict[str, Adapter] = {}
    rounds: list[Rounds | None] = []
    for index, fleet in enumerate(config.fleet):
        if fleet.remote is not None:
            made = _remote_fleet(config, index, leaves)
            by_name.update(dict.fromkeys((fleet.served_name, *fleet.aliases), made))
            continue
        own = adapters_of(fleet)
        adapters.update(own)
        specs = replica_specs(config, index, text, tuple(own.values()))
        links = [ReplicaLink(spec.name) for spec in specs]
        router, log = router_of(config, index, leaves)
        steering = steering_of(config, index, router, log)
        made = Fleet(
            fleet.served_name,
            links,
            router,
            max_outstanding=fleet.max_outstanding,
            steering=steering,
        )
        rounds.append(rounds_of(made, steering, leaves.start, specs[0], len(specs)))
        by_name.update(dict.fromkeys((fleet.served_name, *fleet.aliases), made))
        starting.extend(zip(specs, links, strict=True))
    turning = [each for each in rounds if each is not None]
    service = Fleets(by_name, after=leaves.stop, adapters=adapters, rounds=turning)
    try:
        await asyncio.gather(*(leaves.start(spec, link) for spec, link in starting))
    except BaseException:
        await service.stop()
        raise
    for each in turning:
        each.start()
    return service


def _remote_fleet(config: Config, index: int, leaves: Leaves) -> Fleet:
    """Foreign servers as one fleet; whether they are up is seen while it serves."""
    fleet = config.fleet[index]
    if leaves.remote is None:
        raise BadConfig(
            f"fleet[{index}].remote names servers, which a simulation has none of",
            hint="`penstock serve` stands in front of them; simulate with executor.kind = modelled",
        )
    ports, (router, _) = leaves.remote(fleet), router_of(config, index, leaves)
    return Fleet(fleet.served_name, ports, router, max_outstanding=fleet.max_outstanding)


def replica_specs(
    config: Config, index: int, text: str = "", adapters: Sequence[Adapter] = ()
) -> list[ReplicaSpec]:
    """What each replica of a fleet is made from; their names say fleet and number."""
    fleet = config.fleet[index]
    sizes = [_most(each) for each in config.fleet]
    before, in_all = sum(sizes[:index]), sum(sizes)
    tables = policy_tables(fleet.policy, fleet.cache.prefix, f"fleet[{index}].policy")
    for slot in FLEET_SLOTS:
        tables.pop(slot, None)
    if fleet.speculation is not None:
        tables["batch"] = guessing(tables["batch"], fleet.speculation)
    return [
        ReplicaSpec(
            name=f"{fleet.served_name}-{number}",
            model=fleet.model,
            seed=config.seed,
            policies=tables,
            executor=fleet.executor_of(fleet.role_of(number)),
            lengths=fleet.lengths,
            block_size=fleet.cache.block_size,
            num_blocks=fleet.cache.num_blocks,
            memory_bytes=fleet.cache.memory_bytes,
            has_prefix_cache=fleet.cache.prefix,
            store=fleet.cache.store,
            swap=fleet.cache.swap,
            tiers=fleet.cache.tiers,
            peers=fleet.cache.peers,
            lends=fleet.lends,
            adapters={each.key: Path(each.folder) for each in adapters},
            max_adapters=slots_of(config, fleet),
            adapter_rank=rank_of(fleet),
            speculation=fleet.speculation,
            neighbours=Neighbours(count=in_all, index=before + number),
            max_waiting=fleet.max_waiting,
            max_open=fleet.max_open,
            role=fleet.role_of(number),
            report_s=config.net.report_s,
            kv=config.net.kv,
            tells=tells_of(config, index),
            pull_share=fleet.hand_off.pull_share,
            is_checked=config.is_checked,
            log_dir=config.log.dir,
            config=text,
        )
        for number in range(fleet.replicas)
    ]


def _most(fleet: FleetConfig) -> int:
    """Replicas of our own that there can be at once."""
    if fleet.remote is not None:
        return 0
    return fleet.replicas if fleet.size is None else max(fleet.replicas, fleet.size.most)


def router_of(config: Config, index: int, leaves: Leaves) -> tuple[Router, Log]:
    """And the log that it shares with what else decides for the fleet."""
    fleet = config.fleet[index]
    tables = policy_tables(fleet.policy, fleet.cache.prefix, f"fleet[{index}].policy")
    chosen = policy_of("route", tables["route"], f"fleet[{index}].policy.route")
    decode: object = None
    if "route_decode" in tables:
        where = f"fleet[{index}].policy.route_decode"
        decode = policy_of("route_decode", tables["route_decode"], where)
    name = f"fleet-{fleet.served_name}"
    log = leaves.log(name)
    log.emit(opened(now(), name, made_fleet(config, index)))
    first, second = cast(route.Policy, chosen), cast(route.Policy | None, decode)
    router = Router(
        name,
        first if second is None else ByStage(first, second),
        log=log,
        seed=config.seed,
        is_checked=config.is_checked,
        sight=sight_of(config, index, (chosen, decode)),
    )
    return router, log
