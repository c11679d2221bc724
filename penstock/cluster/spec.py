"""All that is needed to bring up one replica, as plain data: it travels to the engine's process as JSON.

`policies` holds one table for each slot of a replica; a table is `name` and the fields of the policy's class. They were
checked where the configuration was read, so errors in another process are bugs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from penstock import policy
from penstock.core.clock import now
from penstock.core.config import Table, build
from penstock.core.drafts import Speculation
from penstock.core.errors import BadConfig
from penstock.core.ports import Channel, Executor, FilingExecutor, Log, Transport
from penstock.core.reshaping import Reshaper
from penstock.core.types import CanvasRule, Role
from penstock.cost.lengths import History
from penstock.engine.host import Host
from penstock.engine.host_adapters import HostAdapters, Reader
from penstock.engine.limits import BoundLimits
from penstock.engine.peers import PeersConfig
from penstock.engine.replica import OnOutputs, Replica, ReplicaConfig
from penstock.engine.reports import Tells
from penstock.engine.swap import Store, SwapConfig
from penstock.engine.tier_config import TiersConfig
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.net.kv_link import KvLink
from penstock.report.made import MadeReplica, opened

SLOTS: dict[str, str] = {  # slot -> kind of policy
    "order": "order",
    "admit": "admit",
    "batch": "batch",
    "evict": "evict",
    "blocks": "evict",
    "route": "route",
    "limit": "limit",
    "fetch": "fetch",
    "route_decode": "route",
    "move": "move",
    "scale": "scale",
}
UNTOLD = frozenset(  # fields that came later: unset, they leave logs what they were before
    {
        "speculation",
        "max_open",
        "role",
        "neighbours",
        "tells",
        "tiers",
        "lends",
        "kv",
        "is_added",
        "peers",
        "pull_share",
    }
)
FLEET_SLOTS = ("route", "route_decode", "move", "scale")  # the others are a replica's


@dataclass(frozen=True, kw_only=True)
class ExecutorSpec:
    """What runs the plans. `gpu` names a card of the catalogue and `profile` a file of `penstock bench calibrate`:
    a modelled executor takes its times from them, any replica its predictions (the profile wins).
    `op_tables` (a folder) or `tables` ("aiconfigurator") give a modelled executor kernel times measured on that card,
    `tables` "distserve" and "distserve-vllm" the step times that DistServe published of two engines (cost.linear_five),
    `engine` ("vllm 0.19") what an engine adds to them (cost.engines), `engine_costs` changes single numbers of it, say
    {prefill_s = 0.002}; `clock` is the share of its full clock that the
    card is locked to (roofline only).
    `scheduler` says what deciding a step costs a modelled replica: "stored" or a file (cost.schedulers); None: as the
    profile says.
    `adapter_load_s`: what it takes a modelled replica to load an adapter.
    `lanes`: plans that run side by side; None: as many as the batch policy is made for (semi-pd: 2) where the executor
    can run them, else one. `sharing` says how modelled ones slow each other down (cost.sharing).
    `templates`: files of `penstock plan pipeline`, which a modelled executor runs full steps under when the policies
    ask for it (constant-dense does); they must have been searched for this very card, model and degree.
    `canvas`: how a diffusion language model fills its answers (core.canvas).
    `weights`: as stored, or in how many bits torch keeps them (a roofline reads that many bytes of them).
    `kv`: what keys and values are kept in: "auto" as `dtype`, or "int8" with a scale for each vector.
    `compiler` (C++) and `kernel_cache` (a folder) are of the CPU kernels; None: $CXX or what is found, and ~/.cache.
    `niceness`: of the threads that compute (0 to 19), so that the HTTP process comes first where cores are few.
    `packed_cache`: where packed weights are kept for the next start: "auto" (beside the kernels), a folder, or "off".
    `expert_devices`: the experts of mixtures live in so many processes, which can become more or fewer, and of which
    `expert_standby` wait (torch on a CPU); a modelled executor divides its steps over so many cards
    of `gpu` (cost.divided) and changes within `reshape_s`, meanwhile serving or not (`reshape_stops`). None: no such
    devices.
    `start_s`: what it takes a modelled replica to come up that is added while others serve.
    `vision`: the tower (cost.vision) by which a modelled replica takes images; None: text only, as all real ones.
    `graphs`: decode steps of up to `graph_batch` jobs are recorded on CUDA where that is possible, or never ("off").
    """

    kind: Literal["torch", "modelled"] = "torch"
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    weights: Literal["stored", "int8", "int4"] = "stored"
    kv: Literal["auto", "int8"] = "auto"
    tensor_parallel: int = 1
    threads: int | None = None
    gpu: str | None = None
    profile: Path | None = None
    op_tables: Path | None = None
    tables: Literal["aiconfigurator", "distserve", "distserve-vllm"] | None = None
    engine: str | None = None
    engine_costs: dict[str, float] = field(default_factory=dict)
    clock: float = 1.0
    scheduler: str | None = None
    max_context: int | None = None
    lanes: int | None = None
    sharing: str = "fair"
    adapter_load_s: float = 0.05
    templates: tuple[Path, ...] = ()
    canvas: CanvasRule = CanvasRule()
    compiler: str | None = None
    kernel_cache: Path | None = None
    niceness: int = 0
    packed_cache: str = "auto"
    graphs: Literal["auto", "off"] = "auto"
    graph_batch: int = 128
    expert_devices: int | None = None
    expert_standby: int = 1
    reshape_s: float = 2.43
    reshape_stops: bool = False
    start_s: float = 0.0
    vision: str | None = None

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise ValueError(f"tensor_parallel must be at least 1, got {self.tensor_parallel}")
        if not 0.0 < self.clock <= 1.0:
            raise ValueError(f"clock must be a share above 0 and at most 1, got {self.clock}")
        if self.op_tables is not None and self.tables is not None:
            raise ValueError("op_tables and tables are two sources of the same times: give one")
        if self.engine is None and self.engine_costs:
            raise ValueError("engine_costs change an engine's numbers: name it with engine")
        if self.engine is not None and self.op_tables is None and self.tables is None:
            raise ValueError("engine adds to kernel times: give op_tables or tables too")
        if not 0 <= self.adapter_load_s < float("inf"):
            raise ValueError(f"adapter_load_s must be seconds from 0 up, got {self.adapter_load_s}")
        if not 0 <= self.niceness <= 19:
            raise ValueError(f"niceness must be 0 to 19, got {self.niceness}")
        if self.lanes is not None and self.lanes < 1:
            raise ValueError(f"lanes must be at least 1, got {self.lanes}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.max_context is not None and self.max_context < 1:
            raise ValueError(f"max_context must be at least 1, got {self.max_context}")
        if self.graph_batch < 1:
            raise ValueError(f"graph_batch must be at least 1, got {self.graph_batch}")
        self._check_devices()

    def _check_devices(self) -> None:
        if self.expert_devices is not None and self.expert_devices < 1:
            raise ValueError(f"expert_devices must be at least 1, got {self.expert_devices}")
        if self.expert_standby < 0:
            raise ValueError(f"expert_standby must be 0 or more, got {self.expert_standby}")
        if not (0 <= self.reshape_s < float("inf") and 0 <= self.start_s < float("inf")):
            raise ValueError("reshape_s and start_s must be seconds from 0 up")


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """How many replicas share the machine, and which of them this one is: cores, cards and memory are divided."""

    count: int = 1
    index: int = 0


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """`num_blocks` and `memory_bytes` None: the executor decides.

    `max_adapters` can be resident at once, of ranks up to `adapter_rank`; `adapters` are known from the start, by key.
    """

    name: str
    model: str
    seed: int = 0
    policies: dict[str, Table] = field(default_factory=dict)
    executor: ExecutorSpec = ExecutorSpec()
    lengths: History = History()
    block_size: int = 16
    num_blocks: int | None = None
    memory_bytes: int | None = None
    has_prefix_cache: bool = True
    store: Store = "hash"
    swap: SwapConfig = SwapConfig()
    tiers: TiersConfig = TiersConfig()
    peers: PeersConfig | None = None
    lends: bool = False
    adapters: dict[str, Path] = field(default_factory=dict)
    max_adapters: int = 0
    adapter_rank: int = 16
    speculation: Speculation | None = None
    neighbours: Neighbours = Neighbours()
    max_waiting: int | None = None
    max_open: int | None = None
    role: Role = "any"
    report_s: float = 0.1
    kv: KvLink = KvLink()  # by which others read its blocks
    tells: tuple[Tells, ...] = ()  # what its fleet's policies want to hear
    pull_share: float | None = None  # see engine.joinings
    is_checked: bool = False
    is_added: bool = False  # while others serve
    log_dir: Path | None = None
    config: str = ""  # TOML of the whole deployment, for the log's header

    def to_json(self) -> str:
        told = dataclasses.asdict(self)
        for each in dataclasses.fields(self):
            if each.name in UNTOLD and getattr(self, each.name) == each.default:
                del told[each.name]
        if self.executor.vision is None:
            del told["executor"]["vision"]
        return json.dumps(told, default=str)

    @classmethod
    def from_json(cls, text: str) -> ReplicaSpec:
        return build(cls, json.loads(text))


USUAL_STEP = 2048  # tokens of the largest step where a policy does not say
USUAL_JOBS = 256  # and jobs in it


def lanes_of(executor: ExecutorSpec, policies: Mapping[str, Mapping[str, object]]) -> int:
    """Plans that are to run side by side: as told, or as the batch policy likes."""
    if executor.lanes is not None:
        return executor.lanes
    found = policy.find("batch", str(policies["batch"]["name"]))
    return int(getattr(found, "num_lanes", 1))


def step_tokens_of(policies: Mapping[str, Mapping[str, object]]) -> int | None:
    """Tokens of the largest step, as the batch policy says; None: a whole context."""
    batch = policy_of("batch", policies["batch"], "policy.batch")
    inner: Mapping[str, object] | None = getattr(batch, "inner", None)
    if inner is not None:  # who guesses lets another one plan
        return step_tokens_of({"batch": inner})
    told = ("max_tokens", "chunk_tokens", "round_tokens")
    names = [name for name in told if hasattr(batch, name)]
    return getattr(batch, names[0]) if names else USUAL_STEP


def step_jobs_of(policies: Mapping[str, Mapping[str, object]]) -> int:
    """Jobs that may draw a token in one step, as the batch policy says."""
    batch = policy_of("batch", policies["batch"], "policy.batch")
    names = [name for name in ("max_sequences", "max_jobs") if hasattr(batch, name)]
    return int(getattr(batch, names[0])) if names else USUAL_JOBS


def policy_of(slot: str, table: Mapping[str, object], where: str) -> object:
    """A fresh policy for a slot. Raises BadConfig that names `where`."""
    kind = SLOTS[slot]
    fields = dict(table)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        known = ", ".join(sorted(policy.TABLE.get(kind, {})))
        raise BadConfig(f"{where} needs a name; known: {known}")
    try:
        found = policy.find(kind, name)
    except KeyError as error:
        raise BadConfig(f"{where}.name: {error.args[0]}") from None
    made: object = build(found, fields, where)
    wrap = getattr(made, "wrap", None)
    if wrap is not None:
        inner = policy_of(slot, made.inner, f"{where}.inner")  # type: ignore[attr-defined]
        try:
            wrap(inner)
        except ValueError as error:
            raise BadConfig(f"{where}.inner: {error}") from None
    return made


def policies_of(
    tables: Mapping[str, Mapping[str, object]], where: str = "policy"
) -> ReplicaPolicies:
    """The policies of a replica."""
    slots = [name for name in SLOTS if name not in (*FLEET_SLOTS, "limit", "fetch")]
    slots += ["fetch"] if "fetch" in tables else []
    made = {slot: policy_of(slot, tables[slot], f"{where}.{slot}") for slot in slots}
    bind = getattr(made["batch"], "bind_limits", None)
    limit = tables.get("limit", {"name": "fixed"})
    if bind is not None and limit["name"] != "fixed":
        found = policy_of("limit", limit, f"{where}.limit")
        bind(BoundLimits(found))  # type: ignore[arg-type]
    return ReplicaPolicies(**made)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What a replica touches or asks: its executor, its predictors and its log. `about`: for people.

    `adapters` reads those that come while it runs (engine.host_adapters). `transport`: for requests that move.
    `reshaper`: where its devices can be changed.
    """

    executor: Executor
    num_blocks: int
    predictors: Predictors
    log: Log
    about: str = ""
    adapters: Reader | None = None
    transport: Transport | None = None
    reshaper: Reshaper | None = None


def open_host(
    spec: ReplicaSpec, channel: Channel, outside: Outside, *, beat_s: float | None = None
) -> Host:
    """The replica of a spec behind a channel; `await host.run()` serves it."""
    config = ReplicaConfig(
        name=spec.name,
        num_blocks=outside.num_blocks,
        block_size=spec.block_size,
        has_prefix_cache=spec.has_prefix_cache,
        store=spec.store,
        max_waiting=spec.max_waiting,
        max_open=spec.max_open,
        seed=spec.seed,
        is_checked=spec.is_checked,
        swap=spec.swap,
        role=spec.role,
        tells=spec.tells,
        pull_share=spec.pull_share,
    )
    policies = policies_of(spec.policies)

    plain = dataclasses.replace(spec, config="", log_dir=None, neighbours=Neighbours())
    told = json.loads(plain.to_json())
    caps, found = outside.executor.caps, None
    if caps.disk_blocks:
        found = tuple(
            (name.hex(), slot) for name, slot in cast(FilingExecutor, outside.executor).found
        )
    made = MadeReplica(spec=told, num_blocks=outside.num_blocks, caps=caps, found=found)
    outside.log.emit(opened(now(), spec.name, made))

    def open_replica(on_outputs: OnOutputs) -> Replica:
        return Replica(
            config,
            outside.executor,
            policies,
            outside.predictors,
            log=outside.log,
            on_outputs=on_outputs,
        )

    adapters = HostAdapters(
        slots=outside.executor.caps.max_adapters, folders=spec.adapters, reader=outside.adapters
    )
    host = Host(
        channel,
        open_replica,
        report_s=spec.report_s,
        about=outside.about,
        adapters=adapters,
        beat_s=beat_s,
    )
    if outside.transport is not None:
        host.use(outside.transport, spec.peers)
    if outside.reshaper is not None:
        host.spread(outside.reshaper)
    return host


OpenOutside = Callable[[ReplicaSpec], Outside]
