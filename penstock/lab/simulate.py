"""A deployment on a trace, in virtual time: the service is the one that `serve` starts, only its leaves are modelled.

    outcome = simulate(config, trace)

What came out is a function of the configuration, the seed and the trace: equal arguments give an equal log, bit for
bit, and `digest` names it. Nothing was run on the hardware it speaks of, so an outcome says where its times come from:
the row of the card catalogue with its date, the model's shape, the cost model and its digest.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from penstock.assemble import Config, FleetConfig, assemble, modelled_leaves
from penstock.assemble.leaves import Meters
from penstock.assemble.presets import policy_tables
from penstock.assemble.print_config import print_config
from penstock.assemble.vision import vision_of
from penstock.cluster.logs import header_of
from penstock.cluster.predictors import scheduler_of, shape_of_model, step_model
from penstock.core.clock import wall_anchor
from penstock.core.events import Header
from penstock.core.ports import Log
from penstock.core.types import SCHEMA
from penstock.cost.energy import FleetEnergy, energy_of
from penstock.cost.hardware import card_of
from penstock.lab.play import Played, play
from penstock.report.account import Account, Accounted
from penstock.report.log import Fanout
from penstock.report.summary import Figures
from penstock.sim.loop import run
from penstock.traffic import Item, TraceMeta


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where one fleet's times come from. `card`, `as_of` and `is_measured` are None when a profile gives them.

    `scheduler`: what is charged for deciding a step; None = nothing is. `has_tables`: kernel times are from operator
    tables, which the name of the cost model tells with their digest.
    """

    fleet: str
    replicas: int
    model: str
    params: int
    cost_model: str
    digest: str
    card: str | None = None
    as_of: str | None = None
    is_measured: bool | None = None
    profile: str | None = None
    price_h: float | None = None
    scheduler: str | None = None
    scheduler_digest: str | None = None
    has_tables: bool = False

    def __str__(self) -> str:
        size = f"{self.params / 1e9:.2f}B" if self.params >= 1e9 else f"{self.params / 1e6:.1f}M"
        told = f"{self.fleet}: {self.replicas} x {self.model} ({size} parameters), times from the "
        told += f"{self.cost_model} [{self.digest}]"
        if self.scheduler is not None:
            told += f", scheduler time from {self.scheduler}"
        if self.profile is not None:
            return f"{told}, profile {self.profile}"
        if self.has_tables:
            return f"{told}, links, memory, price and power of the card as of {self.as_of}"
        source = "published measurements" if self.is_measured else "assumptions"
        return f"{told}, card data as of {self.as_of}, efficiencies from {source}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a simulation gave. `digest` names the whole event log; `wall_s` is what it took here."""

    figures: Figures
    played: Played
    trace: TraceMeta
    sources: tuple[Source, ...]
    seed: int
    digest: str
    num_events: int
    wall_s: float
    log: Path | None = None
    energy: tuple[FleetEnergy, ...] = ()

    @property
    def energy_j(self) -> float | None:
        """Of all fleets; None when that of any is not known."""
        found = [one.joules for one in self.energy]
        known = [joules for joules in found if joules is not None]
        return math.fsum(known) if known and len(known) == len(found) else None

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "schema": SCHEMA,
            "is_simulation": True,
            "seed": self.seed,
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "trace": dataclasses.asdict(self.trace),
            "played": dataclasses.asdict(self.played),
            "figures": self.figures.to_dict(),
            "digest": self.digest,
            "num_events": self.num_events,
            "wall_s": round(self.wall_s, 3),
            "log": None if self.log is None else str(self.log),
            "energy": [dataclasses.asdict(one) for one in self.energy],
        }


def source_of(fleet: FleetConfig) -> Source:
    """Raises BadConfig and BadModel when a fleet cannot be simulated."""
    executor = dataclasses.replace(fleet.executor, kind="modelled")
    shape = shape_of_model(fleet.model, executor)
    model = step_model(executor, shape)
    charged = scheduler_of(executor, policy_tables(fleet.policy, fleet.cache.prefix))
    name, digest = model.name, model.digest
    if executor.vision is not None:
        vision = vision_of(executor)
        name, digest = f"{name}, images by {vision.name}", f"{digest}+{vision.digest}"
    card = None
    if executor.profile is None and executor.gpu is not None:
        card = card_of(executor.gpu)
    return Source(
        fleet=fleet.served_name,
        replicas=fleet.replicas,
        model=fleet.model,
        params=shape.params,
        cost_model=name,
        digest=digest,
        card=card.name if card else None,
        as_of=card.as_of if card else None,
        is_measured=card.measured if card else None,
        profile=None if executor.profile is None else str(executor.profile),
        price_h=card.price_h * fleet.num_devices if card else None,
        scheduler=None if charged is None else str(charged),
        scheduler_digest=None if charged is None else charged.digest,
        has_tables=executor.op_tables is not None or executor.tables is not None,
    )


class Traffic(Protocol):
    """What can be played: (seconds from the start, what comes) in time order, and an account that grows meanwhile."""

    @property
    def meta(self) -> TraceMeta: ...

    def __iter__(self) -> Iterator[tuple[float, Item]]: ...


def simulate(
    config: Config,
    trace: Traffic,
    *,
    log_path: Path | None = None,
    on_progress: Callable[[Played], None] | None = None,
    has_gaps: bool = True,
    listeners: Sequence[Log] = (),
    may_fork: bool = False,
) -> Simulated:
    """Play a trace on a configuration in virtual time.

    `has_gaps` False leaves the gaps between tokens (ITL) out of the figures, which saves some time. `listeners` hear
    every event as it happens, for figures that nobody else needs. `may_fork`: a second process may count the figures of
    a long run (report.account); leave it off where several simulations run side by side.
    """
    sources = tuple(source_of(fleet) for fleet in config.fleet)
    account = Account(log_path=log_path, has_gaps=has_gaps, may_fork=may_fork)
    meters: Meters = {}
    try:
        with _rare_collection():
            playing = _play(
                config, trace, account, listeners, sources, meters=meters, on_progress=on_progress
            )
            played, told, wall_s = run(playing)
    except BaseException:
        account.abandon()
        raise
    figures = _with_errors(told.figures, played)
    return Simulated(
        figures=figures,
        played=played,
        trace=trace.meta,
        sources=sources,
        seed=config.seed,
        digest=told.digest,
        num_events=told.num_events,
        wall_s=wall_s,
        log=log_path,
        energy=_energy(sources, meters, figures),
    )


@contextmanager
def _rare_collection() -> Iterator[None]:
    """Looks for garbage in cycles less often: a run makes hardly any, and looking takes a twentieth of its time."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _energy(sources: Sequence[Source], meters: Meters, figures: Figures) -> tuple[FleetEnergy, ...]:
    """What each fleet drew and cost. Tokens are not told apart by fleet, so a token has a price only with one fleet."""
    tokens = figures.all.output_tokens if len(sources) == 1 else 0
    return tuple(
        energy_of(
            source.fleet,
            [
                meter
                for name, each in meters.items()
                for meter in each
                if _is_of(name, source.fleet)
            ],
            duration_s=figures.duration_s,
            output_tokens=tokens,
            price_h=source.price_h,
        )
        for source in sources
    )


def _is_of(replica: str, fleet: str) -> bool:
    return replica.rpartition("-")[0] == fleet


def _with_errors(figures: Figures, played: Played) -> Figures:
    """Errors that no log shows too: a request for a model that nobody serves reaches no fleet."""
    errors = dict(figures.errors)
    for code, count in played.errors.items():
        errors[code] = max(count, errors.get(code, 0))
    return dataclasses.replace(figures, errors=errors)


async def _play(
    config: Config,
    trace: Traffic,
    account: Account,
    listeners: Sequence[Log],
    sources: tuple[Source, ...],
    *,
    meters: Meters,
    on_progress: Callable[[Played], None] | None,
) -> tuple[Played, Accounted, float]:
    began_at = wall_anchor()[1]
    log = Fanout(account, *listeners) if listeners else account
    log.emit(_header(config, sources))
    service = await assemble(config, modelled_leaves(config, log, meters=meters))
    try:
        played = await play(trace, service, on_progress=on_progress)
    finally:
        await service.stop()
    return played, account.close(), wall_anchor()[1] - began_at


def _header(config: Config, sources: tuple[Source, ...]) -> Header:
    found = {source.digest for source in sources}
    found |= {source.scheduler_digest for source in sources if source.scheduler_digest is not None}
    digests = "+".join(sorted(found))
    text = print_config(config)
    return header_of("simulation", config=text, seed=config.seed, profile=digests)
