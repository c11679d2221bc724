"""From a model folder and a configuration to one rank's decoder. Every rank runs this on its own shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from penstock.core.drafts import Speculation
from penstock.core.errors import BadConfig
from penstock.engine.folder import ModelFacts
from penstock.engine.tier_config import TiersConfig
from penstock.engine.torch.attention import TRITON, KvLayout, choose_backend
from penstock.engine.torch.beside import USUAL_JOBS, Beside, Use, beside_of
from penstock.engine.torch.decoder import Decoder, Rank
from penstock.engine.torch.families import Shape
from penstock.engine.torch.kernels import build_with
from penstock.engine.torch.linear import (
    Methods,
    Weights,
    choose_methods,
    is_bf16_fast,
    mappable,
)
from penstock.engine.torch.load import check_split, load_decoder
from penstock.engine.torch.memory import FREE_SHARE, block_bytes, choose_num_blocks
from penstock.engine.torch.mlp import ExpertLoads, Mixture, packed_bytes
from penstock.engine.torch.packed import LIMIT_BYTES, store_of
from penstock.engine.torch.ports import DTYPES
from penstock.engine.torch.recorded import spaces_of
from penstock.engine.torch.shared import KvTransport, transport_of
from penstock.engine.torch.sharing import Sharing, open_sharing
from penstock.engine.torch.weights import WeightFolder
from penstock.net.kv_link import KvLink

if TYPE_CHECKING:
    from penstock.engine.torch.cuda.graphs import DecodeGraphs
    from penstock.engine.torch.elastic.change import Changes

LEAST_STEP = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a model is run.

    device      "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N"
    dtype       "auto": what the checkpoint holds, unless bf16 is slow here (see linear.py): then fp32
    weights     "stored", or in fewer bits: "int8", "int4"; see linear.py
    kv          what keys and values are kept in: "auto" = dtype; "int8": whole numbers and a scale for each vector
    threads     of torch, a process; None leaves torch's own choice
    niceness    of the threads that compute, 0 to 19: at more than 0 whoever else wants a core has it first; see lane.py
    num_blocks, memory_bytes, free_share   see memory.py; at most one of them is needed
    step_tokens   of the largest step, for what is left free beside them; None: a whole context, 2048 at least
    step_jobs   that draw a token in it at most, for the same
    max_context None: what the model states. More than that is refused
    attention, linear   "auto", or the portable ones by name
    lanes       plans that run side by side: 1, or 2 on a CPU (cores.py); then `threads` says how many cores they share
    must_have_lanes   False: where two lanes cannot be had there is one, and the notes say why
    graphs      "auto": decode steps of up to `graph_batch` jobs become CUDA graphs where they can; see cuda/graphs.py
    host_blocks, copy_threads   blocks of host memory that jobs may be moved to (0 = none), and who copies; see mover.py
    tiers       host memory and disk for cached blocks, kept in files of that `name`; see slow_memory.py
    max_adapters, adapter_rank, adapters   LoRA adapters that can be resident at once (0 = none), the largest rank, and
        the folders of those that are known from the start, by key; see adapters/
    speculation  who guesses tokens ahead, None = nobody; see drafts/ (how many is said by each plan)
    compiler, kernel_cache   of the CPU kernels: a C++ compiler, and the folder they are kept in; see kernels/build.py
    packed_cache, packed_limit   packed models kept in files: "off", a folder, or "auto" (beside the kernels), and the
        bytes of them all; see packed.py
    expert_devices, expert_standby   the experts of mixtures live in so many processes, and so many wait to be another;
        None: in this one. See elastic/
    packs_once  other processes of this machine load the same model: one packs it, the others wait and map its file
    shares_kv, kv_link   keys and values lie in memory that other replicas can read, and by which way; see shared.py
    shows_host  so does the host memory behind them
    lends       requests may keep a part of their context in another replica's memory, and others' here; see sharing.py
    endpoint, cache_dir, revision, is_offline   where names that are no folders are looked up; see hub.py
    """

    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    weights: Weights = "stored"
    kv: Literal["auto", "int8"] = "auto"
    tensor_parallel: int = 1
    threads: int | None = None
    niceness: int = 0
    num_blocks: int | None = None
    memory_bytes: int | None = None
    free_share: float | None = None
    step_tokens: int | None = LEAST_STEP
    step_jobs: int = USUAL_JOBS
    block_size: int = 16
    max_context: int | None = None
    seed: int = 0
    attention: Literal["auto", "gather"] = "auto"
    linear: Literal["auto", "plain"] = "auto"
    lanes: int = 1
    must_have_lanes: bool = True
    graphs: Literal["auto", "off"] = "auto"
    graph_batch: int = 128
    host_blocks: int = 0
    copy_threads: int = 4
    tiers: TiersConfig = TiersConfig()
    name: str = "replica"
    max_adapters: int = 0
    adapter_rank: int = 16
    adapters: Mapping[str, Path] = field(default_factory=dict)
    speculation: Speculation | None = None
    compiler: str | None = None
    kernel_cache: Path | None = None
    packed_cache: str = "auto"
    packed_limit: int = LIMIT_BYTES
    packs_once: bool = False
    shares_kv: bool = False
    kv_link: KvLink = KvLink()
    shows_host: bool = False
    lends: bool = False
    expert_devices: int | None = None
    expert_standby: int = 1
    endpoint: str | None = None
    cache_dir: Path | None = None
    revision: str | None = None
    is_offline: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.niceness <= 19:
            raise ValueError(f"niceness must be 0 to 19, got {self.niceness}")
        for name in (
            "tensor_parallel",
            "block_size",
            "threads",
            "num_blocks",
            "step_tokens",
            "step_jobs",
            "max_context",
            "lanes",
            "graph_batch",
            "adapter_rank",
            "expert_devices",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(slots=True)
class Loaded:
    """What packed.py keeps."""

    decoder: Decoder
    unread: list[str]
    stored: str | None


@dataclass(slots=True)
class Built:
    """A decoder, and what was decided on the way: `notes` says why, by subject."""

    decoder: Decoder
    device: torch.device
    dtype: torch.dtype
    num_blocks: int
    notes: dict[str, str]
    graphs: DecodeGraphs | None = None
    transport: KvTransport | None = None  # for requests that move
    sharing: Sharing | None = None  # of context between replicas
    changes: Changes | None = None  # of devices for experts
    beside: Beside | None = None  # what else takes memory

    def expert_loads(self, facts: ModelFacts) -> ExpertLoads | None:
        """None of models without experts. A rank's share of an expert counts as one."""
        shape, decoder = facts.shape, self.decoder
        if shape.experts is None:
            return None
        weights = 3 * shape.hidden * shape.experts.width // decoder.rank.world
        mixtures = [layer.mlp for layer in decoder.layers if isinstance(layer.mlp, Mixture)]
        here = mixtures[0].experts if mixtures else []
        few = packed_bytes(here[0]) if here else None
        return ExpertLoads(
            num_layers=shape.num_layers,
            num_experts=shape.experts.count,
            each_bytes=weights * self.dtype.itemsize if few is None else few,
        )


def choose_device(name: str, rank: int = 0) -> torch.device:
    """Raises BadConfig when CUDA is asked for and not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadConfig(f"device {name!r} is not known", hint="say auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise BadConfig(f"device {name!r} is not supported", hint="say auto, cpu or cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BadConfig("there is no CUDA device here", hint="use --device cpu")
        return torch.device("cuda", rank if device.index is None else device.index + rank)
    return device


def choose_dtype(name: str, stored: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype, and why."""
    if name != "auto":
        return DTYPES[name], "asked for"
    if device.type == "cpu" and stored == "bf16" and not is_bf16_fast():
        return torch.float32, "no bf16 instructions here, and no compiled kernel"
    return DTYPES[stored], "as stored"


def methods_of(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Methods:
    methods = choose_methods(device, dtype, config.weights, is_plain=config.linear == "plain")
    return methods if config.expert_devices is None else mappable(methods)


def build_decoder(
    facts: ModelFacts, config: EngineConfig, rank: Rank, num_blocks: int | None
) -> Built:
    """Load this rank's shard. `num_blocks` None: choose. Raises BadModel, BadConfig."""
    max_context = config.max_context or facts.shape.max_context
    shape = facts.shape.serving(max_context)
    build_with(config.compiler, config.kernel_cache)
    check_split(shape, rank.world, str(facts.folder))
    device = choose_device(config.device, rank.rank)
    dtype, why_dtype = choose_dtype(config.dtype, shape.stored_dtype, device)
    layout = _layout(shape, config, dtype, device, rank.world)
    methods = methods_of(config, device, dtype)
    loaded, from_where = _load(facts.folder, config, (shape, dtype, device), methods, rank)
    decoder = loaded.decoder
    beside = beside_of(shape, dtype, device, _use(config, max_context, layout), rank.world)
    free_share = config.free_share
    if device.type == "cpu" and rank.world > 1:  # all ranks take theirs of one memory
        free_share = (FREE_SHARE["cpu"] if free_share is None else free_share) / rank.world
    count = num_blocks or choose_num_blocks(
        layout,
        max_context,
        num_blocks=config.num_blocks,
        memory_bytes=config.memory_bytes,
        free_share=free_share,
        beside_bytes=beside.total * (rank.world if device.type == "cpu" else 1),
    )
    backend, why_attention = choose_backend(layout.holding(count), wanted=config.attention)
    decoder.attention = backend
    transport = _transport(backend, facts.folder.name, config, rank)
    decoder.spaces = spaces_of(decoder)
    notes = {
        "device": str(device),
        "dtype": f"{str(dtype).removeprefix('torch.')}: {why_dtype}",
        **methods.notes,
        "packed": from_where,
        "attention": f"{backend.name}: {why_attention}",
        "kv": "int8, a scale for each vector: asked for" if layout.is_int8 else "as dtype",
        "memory": f"{count * block_bytes(layout) / 1e6:,.0f} MB of keys and values; {beside}",
    }
    if shape.rope.kind == "longrope" and shape.rope.short_factors != shape.rope.long_factors:
        kind, trained = "long" if shape.rope.is_long else "short", shape.rope.original_context
        notes["rope"] = f"{kind} factors: contexts up to {max_context}, trained on {trained}"
    if loaded.stored:
        notes["stored"] = loaded.stored
    if loaded.unread:
        notes["skipped"] = f"tensors this engine has no use for: {', '.join(loaded.unread)}"
    built = Built(decoder, device, dtype, count, notes, transport=transport, beside=beside)
    if config.lends:
        built.sharing = open_sharing(decoder, transport, layout, config)
    if device.type == "cuda":
        built.graphs, notes["graphs"] = _record(built, config, max_context)
    return built


def _layout(
    shape: Shape, config: EngineConfig, dtype: torch.dtype, device: torch.device, world: int
) -> KvLayout:
    """Of blocks that are still to be counted."""
    layout = KvLayout(
        num_layers=shape.num_layers,
        num_blocks=0,
        block_size=config.block_size,
        num_kv_heads=shape.num_kv_heads // world,
        head_dim=shape.head_dim,
        dtype=dtype,
        device=device,
        stored=torch.int8 if config.kv == "int8" else None,
    )
    if shape.latent is None:
        return layout
    told = shape.latent  # one for all heads, so every rank has it whole
    return replace(layout, num_kv_heads=1, head_dim=told.cached, latent=told.width)


def _use(config: EngineConfig, max_context: int, layout: KvLayout) -> Use:
    each = block_bytes(layout)
    host_blocks = config.host_blocks + config.tiers.blocks(each)[0]
    guesses = 0 if config.speculation is None else config.speculation.max_drafts
    return Use(
        rows=config.step_tokens or max(max_context, LEAST_STEP),
        drawn=config.step_jobs * (1 + guesses),
        lanes=config.lanes,
        slots=config.max_adapters,
        rank=config.adapter_rank,
        host_bytes=host_blocks * each,
    )


def _transport(backend: object, name: str, config: EngineConfig, rank: Rank) -> KvTransport | None:
    """None where nobody else reads the cache. Raises BadConfig."""
    if not config.shares_kv or rank.world > 1:
        return None
    return transport_of(backend, name=name, block_size=config.block_size, link=config.kv_link)


def _load(
    checkpoint: Path,
    config: EngineConfig,
    wanted: tuple[Shape, torch.dtype, torch.device],
    methods: Methods,
    rank: Rank,
) -> tuple[Loaded, str]:
    """The decoder without its attention, from the checkpoint or as it was kept, and which."""
    shape, dtype, device = wanted
    store = store_of(config.packed_cache, config.kernel_cache, config.packed_limit)
    place = None
    if device.type == "cpu":
        names = (methods.layers.name, methods.quantised.name, config.linear)
        parts: tuple[object, ...] = (dtype, *names, shape, rank.rank, rank.world)
        if config.expert_devices is not None:
            parts = (*parts, "without experts")
        place = store.place(checkpoint, parts)
    kept = store.recall(place, Loaded, rank)
    if kept is not None:
        return kept, f"mapped from {place}"
    if not config.packs_once or place is None:
        loaded = _pack(checkpoint, wanted, methods, rank, config)
        is_kept = store.keep(place, loaded, rank) is not None
        return loaded, f"packed at this start{f', and kept in {place}' if is_kept else ''}"
    with store.alone(place):
        kept = store.recall(place, Loaded, rank)
        if kept is not None:
            return kept, f"mapped from {place}, which a neighbour packed"
        loaded = _pack(checkpoint, wanted, methods, rank, config)
        writer = store.keep(place, loaded, rank)
        if writer is not None:
            writer.join()
            kept = store.recall(place, Loaded, rank)
        return kept or loaded, f"packed at this start{f', mapped from {place}' if kept else ''}"


def _pack(
    checkpoint: Path,
    wanted: tuple[Shape, torch.dtype, torch.device],
    methods: Methods,
    rank: Rank,
    config: EngineConfig,
) -> Loaded:
    shape, dtype, device = wanted
    folder = WeightFolder(checkpoint, dtype, device, rank=rank.rank, world=rank.world)
    is_whole = config.expert_devices is None
    decoder = load_decoder(
        folder, shape, methods.layers, rank, methods.quantised, has_experts=is_whole
    )
    stored = folder.said()
    if folder.gave_codes:
        stored = f"{stored}; computed as {methods.quantised.name}"
    loaded = Loaded(decoder, folder.unread() if is_whole else [], stored)
    folder.close()
    return loaded


def _record(
    built: Built, config: EngineConfig, max_context: int
) -> tuple[DecodeGraphs | None, str]:
    """Decode steps as graphs, or why there are none."""
    decoder, backend = built.decoder, built.decoder.attention
    reason = None
    if config.graphs == "off":
        reason = "asked for"
    elif backend is None or backend.name != TRITON:
        reason = "the attention in use cannot be recorded"
    elif decoder.rank.world > 1:
        reason = "not over several processes"
    if reason is not None:
        return None, f"none: {reason}"
    from penstock.engine.torch.cuda.graphs import Room
    from penstock.engine.torch.cuda.record import record

    most = min(max_context, built.num_blocks * config.block_size)
    room = Room(most, config.block_size, built.num_blocks, built.device)
    with torch.inference_mode():
        return record(decoder, room, config.graph_batch)
