"""The leaves of a deployment: all that differs between serving and simulating.

`serve` puts every replica into a process with a torch executor, over ZeroMQ; `simulate` keeps them in this process with
modelled executors on modelled links. From here on inwards the code is the same.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from penstock.assemble.canvases import canvas_outside, fills_canvases
from penstock.assemble.config import Config, FleetConfig, ServeConfig
from penstock.assemble.encoding import encoding
from penstock.assemble.print_config import print_config
from penstock.assemble.vision import tower_blocks
from penstock.cluster.inside import Inside
from penstock.cluster.link import ReplicaLink
from penstock.cluster.logs import close_log, header_of, open_log
from penstock.cluster.predictors import (
    executed,
    meter_of,
    predictors_of,
    scheduler_of,
    shape_of_model,
    templates_of,
)
from penstock.cluster.spec import ExecutorSpec, Outside, ReplicaSpec, lanes_of
from penstock.core.errors import BadConfig
from penstock.core.moving import KvCard
from penstock.core.ports import Channel, Log, ReplicaPort
from penstock.core.types import Caps, HostLink, StepTemplate
from penstock.cost.divided import Divided
from penstock.cost.energy import EnergyMeter
from penstock.cost.hardware import card_of, num_blocks
from penstock.cost.shapes import ModelShape
from penstock.cost.sharing import sharing_of
from penstock.cost.step import StepModel
from penstock.report.recent import Recent
from penstock.sim.channel import Link, pair
from penstock.sim.drafts import Drafting, DraftingExecutor
from penstock.sim.elastic import ElasticExecutor
from penstock.sim.executor import ModelledExecutor, SchedulerTime
from penstock.sim.lanes import LanedExecutor
from penstock.sim.lending import LendingExecutor
from penstock.sim.transport import Fabric, ModelledTransport

if TYPE_CHECKING:
    from penstock.assemble.remotes import Remotes
    from penstock.cluster.keeper import Runtime

MAX_REPEAT = 1 << 20
EMBEDDING_ITEM_BYTES = 2  # fp16 or bf16


@dataclass(frozen=True, kw_only=True)
class Leaves:
    """`start` brings up the replica of a spec and attaches its channel; `log` opens the log of a name.

    `remote`: the replicas of a fleet of foreign servers; there are none in a simulation. `recent`: what its logs told.
    """

    start: Callable[[ReplicaSpec, ReplicaLink], Awaitable[None]]
    stop: Callable[[], Awaitable[None]]
    log: Callable[[str], Log]
    remote: Callable[[FleetConfig], Sequence[ReplicaPort]] | None = None
    recent: Recent | None = None


def runtime_of(serve: ServeConfig) -> Runtime:
    """Processes of this machine, or actors of a Ray cluster: which is connected to here."""
    if serve.ray is not None:
        from penstock.cluster.actors import Actors

        return Actors(
            serve.ray,
            max_restarts=serve.max_restarts,
            start_timeout_s=serve.start_timeout_s,
            patience=serve.patience,
        )
    from penstock.cluster.process import Processes  # brings ZeroMQ, which a simulation does without

    return Processes(
        max_restarts=serve.max_restarts,
        start_timeout_s=serve.start_timeout_s,
        patience=serve.patience,
        outlive=serve.outlive,
    )


def process_leaves(config: Config, remotes: Remotes | None = None) -> tuple[Leaves, Runtime]:
    """Real ones. What runs them is given too, so that a second signal can end them at once. Raises BadConfig."""
    if config.serve.ray is not None and any(fleet.lends for fleet in config.fleet):
        raise BadConfig(
            "lends is for replicas of one machine, and those of a Ray cluster may stand on several",
            hint="leave out lends, or --cluster",
        )
    if any(fleet.hand_off.degrees for fleet in config.fleet):
        raise BadConfig(
            "hand_off.degrees is for modelled replicas: engines hand requests on to engines of the same degree",
            hint="leave it out, and set executor.tensor_parallel; penstock simulate takes it",
        )
    runtime = runtime_of(config.serve)
    opened: list[Log] = []
    recent = Recent()
    text = print_config(config)

    def log(who: str) -> Log:
        opened.append(open_log(config.log.dir, header_of(who, config=text, seed=config.seed)))
        return recent.beside(opened[-1])

    async def stop() -> None:
        await runtime.stop()
        if remotes is not None:
            await remotes.close()
        for each in opened:
            close_log(each)

    remote = None if remotes is None else remotes.ports
    return Leaves(start=runtime.start, stop=stop, log=log, remote=remote, recent=recent), runtime


Meters = dict[str, list[EnergyMeter]]  # of the replicas that were started, by the name of a replica


def modelled_leaves(config: Config, log: Log, *, meters: Meters | None = None) -> Leaves:
    """Modelled ones, all writing to one log (its header is the caller's). `meters` gets those of replicas on cards."""
    link = Link(
        latency_s=config.net.latency_s,
        bytes_per_s=math.inf if config.net.bytes_per_s is None else config.net.bytes_per_s,
    )

    def open_pair() -> tuple[Channel, Channel]:
        return pair(link)

    kv_link = Link(
        latency_s=config.net.latency_s,
        bytes_per_s=math.inf if config.net.kv_bytes_per_s is None else config.net.kv_bytes_per_s,
    )
    fabric = Fabric(kv_link)
    inside = Inside(
        lambda spec: modelled_outside(spec, log, meters=meters, fabric=fabric), open_pair
    )
    return Leaves(start=inside.start, stop=inside.stop, log=lambda who: log)


def modelled_outside(
    spec: ReplicaSpec, log: Log, *, meters: Meters | None = None, fabric: Fabric | None = None
) -> Outside:
    """A modelled executor and predictors of the same step model; without a `fabric` requests move without their keys
    and values. Raises BadConfig, BadModel.
    """
    executor = replace(spec.executor, kind="modelled")
    shape = shape_of_model(spec.model, executor)
    charged = scheduler_of(executor, spec.policies)
    scheduler = None if charged is None else charged.cost.seconds
    if fills_canvases(spec):
        return canvas_outside(spec, shape, scheduler, log)
    lanes = lanes_of(executor, spec.policies)
    if executor.lanes is None and executor.gpu is None:
        lanes = 1  # nobody asked for more, and how they slow each other down depends on the card
    templates = templates_of(executor, shape, lanes)
    _check_named(spec, templates)
    block_bytes = round(shape.kv_bytes * spec.block_size)
    tier_blocks, disk_blocks = spec.tiers.blocks(block_bytes)
    caps = Caps(
        num_layers=shape.layers,
        max_context=min(shape.max_context, executor.max_context or shape.max_context),
        max_repeat=MAX_REPEAT,
        max_lanes=lanes,
        max_total_share=float(lanes),
        has_layer_ranges=True,
        yield_grain="operator",
        host_blocks=spec.swap.host_blocks,
        tier_blocks=tier_blocks,
        disk_blocks=disk_blocks,
        link=_host_link(spec, shape),
        templates=tuple(templates),
        max_adapters=spec.max_adapters,
        moves_jobs=spec.speculation is None,
        lends=spec.lends and fabric is not None,
        encodes=executor.vision is not None,
    )
    meter = None if meters is None else meter_of(executor, shape)
    if meters is not None and meter is not None:
        meters.setdefault(spec.name, []).append(meter)
    transport = None if fabric is None else _transport(spec, shape, fabric)
    made = _modelled(
        replace(spec, executor=executor),
        shape,
        caps,
        scheduler=scheduler,
        meter=meter,
        templates={each.name: model for each, model in templates.items()},
        transport=transport,
    )
    made.adapter_load_s = executor.adapter_load_s
    made.disk_block_s = block_bytes / (1e9 * spec.tiers.disk_gb_s)
    return Outside(
        executor=made,
        num_blocks=_num_blocks(spec, shape),
        predictors=predictors_of(executor, shape, spec.lengths),
        log=log,
        transport=transport,
        reshaper=made if isinstance(made, ElasticExecutor) else None,
    )


def _transport(spec: ReplicaSpec, shape: ModelShape, fabric: Fabric) -> ModelledTransport:
    card = KvCard(
        layout=f"{spec.model}, as modelled",
        address=fabric.fresh(f"inside:{spec.name}"),
        block_size=spec.block_size,
        block_bytes=round(shape.kv_bytes * spec.block_size),
        devices=min(spec.executor.tensor_parallel, shape.kv_heads),  # beyond that heads are doubled
    )
    return ModelledTransport(
        fabric,
        card,
        behind=_num_blocks(spec, shape),
        embedding_bytes=EMBEDDING_ITEM_BYTES * shape.hidden,
    )


def _check_named(spec: ReplicaSpec, templates: Iterable[StepTemplate]) -> None:
    """A policy that asks for one template by name would get none, and nobody would see it."""
    asked, known = spec.policies["batch"].get("nano"), [each.name for each in templates]
    if asked is not None and asked not in known:
        raise BadConfig(
            f"the batch policy asks for the template {asked!r}; this executor has {', '.join(known) or 'none'}",
            hint="name its file in executor.templates, or leave `nano` out: whichever fits is taken",
        )


def _host_link(spec: ReplicaSpec, shape: ModelShape) -> HostLink | None:
    """Every device moves its part over a wire of its own."""
    swap, tiers, devices = spec.swap, spec.tiers, spec.executor.tensor_parallel
    if not swap.host_blocks and tiers.host_bytes is None:
        return None
    is_swap = swap.host_blocks > 0
    return HostLink(
        dispatch_s=swap.dispatch_s if is_swap else tiers.dispatch_s,
        bytes_per_s=devices * (swap.gb_s if is_swap else tiers.host_gb_s) * 1e9,
        block_bytes=round(shape.kv_bytes * spec.block_size),
        pieces=shape.kv_pieces,
    )


def _modelled(
    spec: ReplicaSpec,
    shape: ModelShape,
    caps: Caps,
    *,
    scheduler: SchedulerTime | None,
    meter: EnergyMeter | None,
    templates: Mapping[str, StepModel],
    transport: ModelledTransport | None = None,
) -> ModelledExecutor:
    executor = spec.executor
    model, sharing = executed(executor, shape), sharing_of(executor.sharing)
    if transport is not None and caps.lends:
        _check_lends(spec, caps)
        more = dict(caps=caps, scheduler=scheduler, meter=meter, templates=templates)
        return _lending(spec, shape, model, transport, more)
    if caps.encodes:
        more = dict(scheduler=scheduler, meter=meter, templates=templates)
        return encoding(spec, model, caps, more)
    if spec.speculation is not None:
        guesses = spec.speculation.model
        return DraftingExecutor(
            model,
            Drafting(
                spec.speculation,
                None if guesses is None else executed(executor, shape_of_model(guesses)),
                spec.seed,
            ),
            caps=caps,
            scheduler=scheduler,
            meter=meter,
            templates=templates,
        )
    if executor.expert_devices is not None:
        return _elastic(executor, shape, caps, scheduler, meter)
    if caps.max_lanes == 1:
        return ModelledExecutor(
            model, caps=caps, scheduler=scheduler, meter=meter, templates=templates
        )
    if executor.gpu is None:
        raise BadConfig(
            "lanes that share a device need `gpu`, the card whose memory they share",
            hint='for example --set fleet.0.executor.gpu="a100-80g"',
        )
    card = card_of(executor.gpu)
    return LanedExecutor(
        model,
        caps=caps,
        sharing=sharing,
        bytes_per_s=executor.tensor_parallel * card.bandwidth * card.gemm_mbu,
        scheduler=scheduler,
        meter=meter,
    )


def _lending(
    spec: ReplicaSpec,
    shape: ModelShape,
    model: StepModel,
    transport: ModelledTransport,
    more: dict[str, Any],
) -> LendingExecutor:
    return LendingExecutor(
        model,
        transport.fabric,
        address=transport.card.address,
        num_blocks=_num_blocks(spec, shape),
        block_size=spec.block_size,
        block_bytes=round(shape.kv_bytes * spec.block_size),
        row_bytes=shape.layers * shape.heads * (4 * shape.head_dim + 4),
        **more,
    )


def _check_lends(spec: ReplicaSpec, caps: Caps) -> None:
    """Raises BadConfig."""
    if (
        spec.speculation is not None
        or spec.executor.expert_devices is not None
        or caps.max_lanes > 1
    ):
        raise BadConfig(
            "lends goes with neither speculation, expert_devices nor several lanes",
            hint="leave the fleet's lends out",
        )


def _elastic(
    executor: ExecutorSpec,
    shape: ModelShape,
    caps: Caps,
    scheduler: SchedulerTime | None,
    meter: EnergyMeter | None,
) -> ElasticExecutor:
    """As many cards as devices. Raises BadConfig."""
    if executor.gpu is None or executor.expert_devices is None or caps.max_lanes > 1:
        raise BadConfig(
            "a modelled executor with expert_devices needs `gpu`, the card that each is, and one lane",
            hint='for example --set fleet.0.executor.gpu="a100-80g"',
        )

    def model_of(devices: int) -> StepModel:
        experts = None if shape.experts is None else -(-shape.experts // devices)
        return Divided(executed(executor, replace(shape, experts=experts)), devices)

    return ElasticExecutor(
        model_of,
        executor.expert_devices,
        reshape_s=executor.reshape_s,
        stops=executor.reshape_stops,
        caps=caps,
        scheduler=scheduler,
        meter=meter,
    )


def _num_blocks(spec: ReplicaSpec, shape: ModelShape) -> int:
    if spec.num_blocks is not None:
        return spec.num_blocks
    if spec.memory_bytes is not None or spec.executor.gpu is None:
        room = spec.memory_bytes if spec.memory_bytes is not None else 1 << 30
        return max(1, int(room // (shape.kv_bytes * spec.block_size)))
    executor = spec.executor
    blocks = num_blocks(
        card_of(spec.executor.gpu),
        shape,
        tp=executor.tensor_parallel,
        block_size=spec.block_size,
    )
    return max(1, blocks - tower_blocks(executor, shape.kv_bytes * spec.block_size))
