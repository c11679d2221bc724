"""The configuration of a deployment: what a TOML file, `--set` and the flags of `serve` and `simulate` fill.

    seed = 0
    log = {dir = "logs"}
    [gateway]                       # see penstock.gateway.config
    [hub]                           # where models with a Hub's name come from
    endpoint = "https://hub.example"    # another server with the Hub's API; left out: as huggingface_hub has it
    offline = true                  # ask nobody: take what the cache holds
    cache_dir = "/models/hub"       # left out: huggingface_hub's own
    [net]
    report_s = 0.1
    [[fleet]]                       # one for each model; without any, the default model is served
    model = "default"
    replicas = 1
    executor = {kind = "torch", device = "cpu"}
    cache = {block_size = 16, prefix = true}
    lengths = {window = 1000, by = ["tenant"]}      # answers that foretell the next ones'; see cost.lengths
    speculation = {method = "ngram", max_drafts = 4}    # guess tokens and verify them together; see core.drafts
    remote = {urls = ["http://host:8000"]}          # replicas are foreign servers instead; see cluster.foreign
    policy = {preset = "vllm-v1", order = "slack-edf", batch = {name = "vllm-v1", max_tokens = 512}}

Every key that is not known is refused, at every level, with its place. A policy's table is its constructor: `name` and
the fields of its class; a bare name is a table with that name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast, get_args

from penstock.assemble.cache_config import CacheConfig
from penstock.assemble.hand_off_config import HandOffConfig
from penstock.assemble.presets import GUESSING, bring_host_memory, guessing, policy_tables
from penstock.assemble.vision import check_images
from penstock.cluster.arbiter import MoveRules
from penstock.cluster.bundles import RayConfig
from penstock.cluster.deployment import Outlive
from penstock.cluster.foreign import RemoteConfig
from penstock.cluster.sight import DispatchConfig
from penstock.cluster.silence import Patience
from penstock.cluster.spec import SLOTS, ExecutorSpec, policy_of
from penstock.core.config import Table, build, load_toml, set_path
from penstock.core.drafts import Speculation
from penstock.core.errors import BadConfig
from penstock.core.schema import check_schema
from penstock.core.types import SCHEMA, Role
from penstock.cost.lengths import History
from penstock.gateway.config import GatewayConfig
from penstock.net.config import NetConfig
from penstock.policy.scale import Bounds


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """`dir`: the folder of the event logs, one file a mechanism; None = none are written."""

    dir: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """`drain_timeout_s`: running requests get this long after SIGTERM. `max_restarts` of a crashing engine in a row.

    `patience`: with an engine that says nothing; see cluster.silence. `ray`: engines are actors of a Ray cluster.
    `outlive`: engines outlive a server that dies, and the next one goes on with them; see cluster.deployment.
    `start_timeout_s`: an engine that is not ready after so long, its model loaded, is ended (downloads come before).
    """

    start_timeout_s: float = 600.0
    drain_timeout_s: float = 60.0
    max_restarts: int = 5
    patience: Patience = Patience()
    ray: RayConfig | None = None
    outlive: Outlive | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.drain_timeout_s < math.inf:
            raise ValueError(
                f"drain_timeout_s must be a number of seconds from 0 up, got {self.drain_timeout_s}"
            )
        if not 0 < self.start_timeout_s < math.inf:
            raise ValueError(
                f"start_timeout_s must be a positive number of seconds, got {self.start_timeout_s}"
            )
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts must be at least 0, got {self.max_restarts}")
        if self.ray is not None and self.outlive is not None:
            raise ValueError(
                "outlive is of processes of this machine: Ray ends actors with their server"
            )


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Where models with a Hub's name come from. What is left out is as huggingface_hub's own environment says:
    HF_ENDPOINT, HF_HUB_OFFLINE (which `offline = false` does not undo), HF_HUB_CACHE.
    """

    endpoint: str | None = None
    offline: bool = False
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"endpoint must be a URL (http or https), got {self.endpoint!r}")


THEIRS = (
    "model", "revision", "replicas", "executor", "cache", "speculation", "adapters", "max_waiting", "max_open",
    "roles", "hand_off", "size",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """The replicas of one model: a folder, "default", or a Hub name (of which `revision`). `name` None = made from it.

    `max_waiting` bounds a replica's queue, `max_open` all that a replica has at once (1: no queue at all, whoever comes
    while it works is turned away), `max_outstanding` the requests of the whole fleet; None = no bound.
    `adapters`: names of LoRA adapters and their folders. `max_adapters` of them are in memory at once; None = all that
    are named, from FEWEST_SLOTS to MOST_SLOTS, and none where there can be none. `adapter_rank`: the largest that is
    held; None = that of those that are named, at least LEAST_RANK. `dispatch`: what routers see (cluster.sight).
    `roles`: how many of the replicas take which stage, say {prefill = 2, decode = 2}; None = all take all. `hand_off`:
    from one to the other. `moves`:
    rules of what may move between replicas, and `size`: {least, most} replicas; they matter with `policy.move` and
    `policy.scale`. `lends`: replicas keep blocks for each other's long requests
    (cluster.lendings). `remote`: foreign servers are the replicas, and `name` None stands for all the models they list.
    """

    model: str = "default"
    revision: str | None = None
    name: str | None = None
    aliases: tuple[str, ...] = ()
    replicas: int = 1
    executor: ExecutorSpec = ExecutorSpec()
    cache: CacheConfig = CacheConfig()
    lengths: History = History()
    speculation: Speculation | None = None
    policy: Table = field(default_factory=Table)
    dispatch: DispatchConfig = DispatchConfig()
    adapters: dict[str, Path] = field(default_factory=dict)
    max_adapters: int | None = None
    adapter_rank: int | None = None
    max_waiting: int | None = None
    max_open: int | None = None
    max_outstanding: int | None = None
    roles: dict[str, int] | None = None
    hand_off: HandOffConfig = HandOffConfig()
    moves: MoveRules | None = None
    size: Bounds | None = None
    lends: bool = False
    remote: RemoteConfig | None = None

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"replicas must be at least 1, got {self.replicas}")
        self._check_remote()
        self._check_roles()
        self._check_lending()
        if self.max_adapters is not None and self.max_adapters < bool(self.adapters):
            raise ValueError(
                f"max_adapters must be at least {int(bool(self.adapters))}, got {self.max_adapters}"
            )
        if self.adapter_rank is not None and self.adapter_rank < 1:
            raise ValueError(f"adapter_rank must be at least 1, got {self.adapter_rank}")
        for name in self.adapters:
            if not name or "@" in name:
                raise ValueError(f"{name!r} cannot name an adapter: it may not be empty or hold @")
        for name in ("max_waiting", "max_open", "max_outstanding"):
            bound = getattr(self, name)
            if bound is not None and bound < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {bound}; leave it out for no bound"
                )

    def _check_remote(self) -> None:
        """What a foreign server decides for itself cannot be told it from here."""
        if self.remote is None:
            return
        if not self.remote.urls:
            raise ValueError("remote.urls names no server")
        plain = FleetConfig()
        for name in THEIRS:
            if getattr(self, name) != getattr(plain, name):
                raise ValueError(f"{name} is of the servers that remote.urls names: set it there")
        for slot in ("move", "scale"):
            if slot in self.policy:
                raise ValueError(
                    f"policy.{slot} needs replicas of Penstock's own: foreign servers cannot be told to"
                )

    def _check_lending(self) -> None:
        if not self.lends:
            return
        if self.replicas < 2:
            raise ValueError("lends needs at least 2 replicas")
        cache = self.cache
        has_slower = cache.swap.host_blocks or cache.tiers.host_bytes is not None
        if has_slower or self.speculation is not None or cache.store != "hash":
            raise ValueError(
                "lends goes with neither cache.swap, cache.tiers, speculation nor cache.store radix"
            )

    def _check_roles(self) -> None:
        roles, size = self.roles or {}, self.size
        for role in roles:
            if role not in get_args(Role):
                raise ValueError(f"{role!r} is no role; known: {', '.join(get_args(Role))}")
        if roles and (sum(roles.values()) != self.replicas or min(roles.values()) < 0):
            raise ValueError(f"roles must name {self.replicas} replicas in all, as replicas says")
        if size is not None and not size.least <= self.replicas <= size.most:
            raise ValueError(f"replicas must be from {size.least} to {size.most}, as size says")

        if not self.hand_off.degrees.keys() <= roles.keys():
            raise ValueError("hand_off.degrees names a role that no replica has: see roles")
        if self.hand_off.degrees and (size is not None or "scale" in self.policy):
            raise ValueError("hand_off.degrees goes with neither size nor policy.scale")

    def executor_of(self, role: str) -> ExecutorSpec:
        """Of the replicas of a role."""
        degree = self.hand_off.degrees.get(role)
        return self.executor if degree is None else replace(self.executor, tensor_parallel=degree)

    @property
    def num_devices(self) -> int:
        roles = map(self.role_of, range(self.replicas))
        return sum(self.executor_of(role).tensor_parallel for role in roles)

    def role_of(self, number: int) -> Role:
        """Of the replica with that number; those beyond the roles take everything."""
        roles = [
            cast(Role, role) for role, count in (self.roles or {}).items() for _ in range(count)
        ]
        return roles[number] if number < len(roles) else "any"

    @property
    def served_name(self) -> str:
        """What callers call it: the given name, a folder's last part, or the model as it was written.

        Of a remote fleet without a name, its servers: it is not known yet.
        """
        if self.name is None and self.remote is not None:
            return " ".join(self.remote.urls)
        if self.name is not None:
            return self.name
        path = Path(self.model).expanduser()
        is_path = path.is_absolute() or self.model.startswith((".", "~")) or path.is_dir()
        return path.resolve().name if is_path else self.model


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole. `is_checked`: hold every decision to its law while running (slow)."""

    schema: int = SCHEMA
    seed: int = 0
    is_checked: bool = False
    gateway: GatewayConfig = GatewayConfig()
    hub: HubConfig = HubConfig()
    log: LogConfig = LogConfig()
    net: NetConfig = NetConfig()
    serve: ServeConfig = ServeConfig()
    fleet: tuple[FleetConfig, ...] = (FleetConfig(),)


def load_config(
    path: Path | None = None,
    *,
    model: str | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
) -> Config:
    """Read a file (or nothing), then flags (dotted names), then `--set` assignments; the later ones win.

    `model` replaces the first fleet's. Raises BadConfig or SchemaMismatch.
    """
    table = {} if path is None else load_toml(path)
    schema = table.get("schema", SCHEMA)
    check_schema("the configuration", schema if isinstance(schema, int) else 0)
    fleets = table.setdefault("fleet", [{}])
    if not isinstance(fleets, list) or not fleets:
        raise BadConfig("fleet must be a list of tables", hint="begin each with [[fleet]]")
    if model is not None:
        _put(table, "fleet.0.model", model)
    for name, value in (flags or {}).items():
        if value is not None:
            _put(table, name, value)
    for assignment in sets:
        _open_policies(fleets)
        set_path(table, assignment)
    for fleet in fleets:
        if isinstance(fleet, dict):
            bring_host_memory(fleet)
    config = build(Config, table)
    check(config)
    return config


def _open_policies(fleets: Sequence[object]) -> None:
    """Policies given as bare names become tables, so that `--set fleet.0.policy.batch.max_tokens=64` finds a place."""
    for fleet in fleets:
        policy = fleet.get("policy") if isinstance(fleet, dict) else None
        if isinstance(policy, dict):
            for slot in SLOTS.keys() & policy.keys():
                if isinstance(policy[slot], str):
                    policy[slot] = {"name": policy[slot]}


def _put(table: dict[str, object], name: str, value: object) -> None:
    """set_path for a value that is no text."""
    *parents, last = name.split(".")
    place: object = table
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})  # type: ignore[attr-defined]
    if not isinstance(place, dict):
        raise BadConfig(f"{'.'.join(parents)} must be a table")
    place[last] = value


def check(config: Config) -> None:
    """What no single table can know: names are unique and every policy can be made."""
    if not config.fleet:
        raise BadConfig("there is no fleet to serve", hint="add a [[fleet]] with a model")
    taken: set[str] = set()
    for index, fleet in enumerate(config.fleet):
        for name in (fleet.served_name, *fleet.aliases, *fleet.adapters):
            if name in taken:
                raise BadConfig(
                    f"fleet[{index}]: two models would be called {name!r}",
                    hint="give one of them another `name`, or drop the alias",
                )
            taken.add(name)
        where = f"fleet[{index}].policy"
        tables = policy_tables(fleet.policy, fleet.cache.prefix, where)
        _check_guesses(fleet, tables, f"fleet[{index}]")
        _check_steered(fleet, tables, f"fleet[{index}]")
        for slot, table in tables.items():
            made = policy_of(slot, table, f"{where}.{slot}")
            if slot == "blocks" and fleet.cache.store != "radix":
                _refuse_tree_policy(made, f"{where}.{slot}")
        check_images(fleet.executor, fleet.roles or {}, tables["batch"], f"fleet[{index}]")


def _check_steered(fleet: FleetConfig, tables: dict[str, Table], where: str) -> None:
    """Bounds of what nobody changes are a mistake."""
    for name, slot in (("size", "scale"), ("moves", "move")):
        if getattr(fleet, name) is not None and slot not in tables:
            told = f"{where}.{name} bounds what {where}.policy.{slot} does, and there is none"
            raise BadConfig(told, hint=f"name a policy, or leave out {name}")


def _check_guesses(fleet: FleetConfig, tables: dict[str, Table], where: str) -> None:
    """Guesses need somebody who makes them, and a plan that they have a place in."""
    if fleet.speculation is None:
        if tables["batch"]["name"] == GUESSING:
            raise BadConfig(
                f"{where}.policy.batch plans guesses, and nobody makes any",
                hint=f'add {where}.speculation = {{method = "ngram"}}',
            )
        return
    if (fleet.executor.lanes or 1) > 1 or tables["batch"]["name"] == "diffusion":
        raise BadConfig(
            f"{where}.speculation is for models that write from left to right, on one lane",
            hint="leave it out, or executor.lanes",
        )
    policy_of("batch", guessing(tables["batch"], fleet.speculation), f"{where}.policy.batch")


def _refuse_tree_policy(blocks: object, where: str) -> None:
    if getattr(blocks, "needs_tree", False):
        raise BadConfig(
            f"{where}: this policy ranks the nodes of a tree of prefixes, and cache.store is 'hash'",
            hint='set cache.store = "radix", or take blocks = "lru"',
        )
