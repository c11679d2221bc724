"""One source of a workload: arrivals, and the callers that arrive, as a stream in time order.

A stream yields `(at_s, found)`: rows, flows, and drops at the instant they would have had. With `replay = "open"` a
flow is taken apart into rows at nominal instants, which a heap puts in order.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from penstock.core.config import Table
from penstock.core.errors import BadConfig, BadTrace
from penstock.core.rng import stream
from penstock.traffic.arrivals import arrivals_of
from penstock.traffic.callers import Callers, Kind
from penstock.traffic.custom import parse_columns
from penstock.traffic.models import Model, model_of
from penstock.traffic.rows import Drop, Flow, Found, Row, Source, open_text
from penstock.traffic.tenants import Tenants, picker_of
from penstock.traffic.workflow import instants_of_flow

Stream = Iterator[tuple[float, Found]]
ROUND_BITS = 44  # a trace that begins again has other prompts: its hash ids move up by this


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant(Kind):
    """A tenant with callers of its own kind: a `share` of the source's arrivals, or its own `arrivals`."""

    name: str
    share: float | None = None
    arrivals: Table | None = None

    def __post_init__(self) -> None:
        super(Tenant, self).__post_init__()
        if (self.share is None) == (self.arrivals is None):
            raise ValueError(f"tenant {self.name!r} needs a share or arrivals, and not both")
        if self.share is not None and not self.share > 0:
            raise ValueError(f"the share of tenant {self.name!r} must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin(Kind):
    """A source as written. `model`: a fitted generator, see `traffic.models`. `as_tenant` renames traced tenants."""

    arrivals: Table | None = None
    model: Table | None = None
    trace: Path | None = None
    format: str | None = None
    columns: str | None = None
    speed: float = 1.0
    as_tenant: str | None = None
    tenants: Tenants | None = None
    tenant: tuple[Tenant, ...] = ()

    def __post_init__(self) -> None:
        super(Origin, self).__post_init__()
        if not self.speed > 0:
            raise ValueError(f"speed must be positive, got {self.speed}")
        if self.tenants is not None and self.tenant:
            raise ValueError("state [tenants] or [[tenant]], not both")
        made = (
            self.lengths, self.prefix, self.sessions, self.programs, self.images, self.tenants,
        )  # fmt: skip
        if self.is_given and (self.tenant or any(each is not None for each in made)):
            raise ValueError(
                "with a trace or a model, lengths, prefixes, sessions, images and tenants are its own"
            )
        if self.model is not None and (self.trace is not None or self.arrivals is not None):
            raise ValueError("a model makes its own arrivals: leave out trace and arrivals")
        if self.has_shares and self.arrivals is None:
            raise ValueError("tenants with a share need [arrivals] to share")

    @property
    def is_given(self) -> bool:
        """Whether its callers are not made here but come from a trace or a model."""
        return self.trace is not None or self.model is not None

    @property
    def has_shares(self) -> bool:
        return self.tenants is not None or any(each.share is not None for each in self.tenant)

    @property
    def is_source(self) -> bool:
        """Whether anything arrives from it."""
        told = (self.arrivals, self.trace, self.model, self.tenants)
        return bool(self.tenant) or any(each is not None for each in told)

    @property
    def is_endless(self) -> bool:
        """Whether it may go on for ever."""
        tables = [self.arrivals, *(each.arrivals for each in self.tenant)]
        return any(table is not None and table.get("kind") != "replay" for table in tables)


def streams_of(origin: Origin, *, seed: int, owner: str, where: str) -> list[Stream]:
    """All streams of a source; they are independent of each other."""
    if origin.model is not None:
        model = model_of(origin.model, f"{where}model")
        return [_modelled(origin, model, seed=seed, owner=owner, where=where)]
    if origin.trace is not None:
        return [_traced(origin, seed=seed, owner=owner, where=where)]
    streams = []
    shared = [tenant for tenant in origin.tenant if tenant.share is not None]
    for tenant in origin.tenant:
        if tenant.arrivals is not None:
            callers = _callers(tenant, origin, seed=seed, owner=owner, where=where)
            instants = _instants(tenant.arrivals, seed, f"{owner}/{tenant.name}", where)
            streams.append(_made(instants, _always(tenant.name, callers), callers.is_open))
    if origin.arrivals is not None:
        instants = _instants(origin.arrivals, seed, owner, where)
        pick = _picker(origin, shared, seed=seed, owner=owner, where=where)
        is_open = origin.replay == "open" or any(each.replay == "open" for each in shared)
        streams.append(_made(instants, pick, is_open))
    return streams


def _callers(tenant: Tenant, origin: Origin, *, seed: int, owner: str, where: str) -> Callers:
    """The tenant's kind of callers: what it does not state is the source's."""
    told = {}
    flows_stated = tenant.sessions is not None or tenant.programs is not None
    promises_stated = bool(
        tenant.slo is not None or tenant.priority is not None or tenant.service_class
    )
    for field in dataclasses.fields(Kind):
        value = getattr(tenant, field.name)
        is_told = value is not None and value != ()
        if field.name in ("sessions", "programs"):
            is_told = flows_stated
        elif field.name in ("slo", "priority", "service_class"):
            is_told = promises_stated
        elif field.name == "replay":
            is_told = value == "open"
        told[field.name] = value if is_told else getattr(origin, field.name)
    name = f"{owner}/{tenant.name}"
    return _makers(Kind(**told), seed=seed, owner=name, where=f"{where}tenant.{tenant.name}.")


def _makers(kind: Kind, *, seed: int, owner: str, where: str) -> Callers:
    """Callers whose calls are made here, so that their lengths must be stated."""
    if kind.lengths is None:
        raise BadConfig(
            f"{where.rstrip('.') or 'the workload'} lacks [lengths]",
            hint="state a law of lengths, or name a trace or a model",
        )
    return Callers(kind, seed=seed, owner=owner, where=where)


Pick = Callable[[], tuple[str, Callers]]  # whose the next arrival is


def _always(tenant: str, callers: Callers) -> Pick:
    return lambda: (tenant, callers)


def _picker(origin: Origin, shared: list[Tenant], *, seed: int, owner: str, where: str) -> Pick:
    """Draws (tenant, its callers) of each arrival."""
    chance = stream(seed, "traffic", "tenants", owner)
    if shared:
        kinds = [
            (each.name, _callers(each, origin, seed=seed, owner=owner, where=where))
            for each in shared
        ]
        picker = picker_of(kinds, [each.share or 0.0 for each in shared])
        return lambda: picker.pick(chance)
    callers = _makers(origin, seed=seed, owner=owner, where=where)
    if origin.tenants is not None:
        names = origin.tenants.picker()
        return lambda: (names.pick(chance), callers)
    return _always(origin.as_tenant or "default", callers)


def _made(instants: Iterable[float], pick: Pick, is_open: bool) -> Stream:
    def arriving() -> Stream:
        for at_s in instants:
            tenant, callers = pick()
            yield at_s, callers.arrive(at_s, tenant)

    return opened(arriving()) if is_open else arriving()


def _instants(table: Table, seed: int, owner: str, where: str) -> Iterable[float]:
    own = stream(seed, "traffic", "arrivals", owner).getrandbits(63)
    return arrivals_of(table, f"{where}arrivals").instants(own)


def opened(found: Stream) -> Stream:
    """Flows taken apart into rows at nominal instants; everything in time order."""
    held: list[tuple[float, int, Found]] = []
    count = itertools.count()
    for at_s, each in found:
        while held and held[0][0] <= at_s:
            yield held[0][0], heapq.heappop(held)[2]
        if not isinstance(each, Flow):
            yield at_s, each
            continue
        for row_at_s, step in zip(instants_of_flow(each), each.steps, strict=True):
            heapq.heappush(held, (row_at_s, next(count), step.row._replace(at_s=row_at_s)))
    while held:
        yield held[0][0], heapq.heappop(held)[2]


def _traced(origin: Origin, *, seed: int, owner: str, where: str) -> Stream:
    """A trace's rows with this source's promises, at their instants or at those of its arrivals."""
    callers = Callers(origin, seed=seed, owner=owner, where=where)
    if origin.arrivals is None:
        yield from _replayed(origin, seed, callers)
        return
    rows = _again_and_again(origin, seed)
    for at_s in _instants(origin.arrivals, seed, owner, where):
        while isinstance(row := next(rows), Drop):
            yield at_s, row
        found = row._replace(at_s=at_s)
        yield at_s, callers.overlay(found) if isinstance(found, Row) else found


def _modelled(origin: Origin, model: Model, *, seed: int, owner: str, where: str) -> Stream:
    callers = Callers(origin, seed=seed, owner=owner, where=where)
    own = stream(seed, "traffic", "model", owner).getrandbits(62)
    for row in model.open().rows(own):
        if origin.as_tenant is not None:
            row = row._replace(tenant=origin.as_tenant)
        assert row.at_s is not None
        at_s = row.at_s / origin.speed
        yield at_s, callers.overlay(row._replace(at_s=at_s))


def _replayed(origin: Origin, seed: int, callers: Callers) -> Stream:
    first: float | None = None
    last = 0.0
    for found in _rows(origin, seed):
        if isinstance(found, Drop):
            yield last, found
            continue
        if found.at_s is None:
            raise BadTrace(
                f"{origin.trace} has no arrival times", hint="give this source [arrivals]"
            )
        first = found.at_s if first is None else first
        last = max(last, (found.at_s - first) / origin.speed)
        found = found._replace(at_s=last)
        yield last, callers.overlay(found) if isinstance(found, Row) else found


def _again_and_again(origin: Origin, seed: int) -> Iterator[Found]:
    """The trace for ever. What it drops is told the first time."""
    for turn in itertools.count():
        num = 0
        for found in _rows(origin, seed):
            if isinstance(found, Row):
                num += 1
                ids = tuple(id + (turn << ROUND_BITS) for id in found.hash_ids)
                session = found.session and (f"{found.session}.{turn}" if turn else found.session)
                yield found._replace(hash_ids=ids, session=session)
            elif isinstance(found, Flow):
                num += 1
                yield found
            elif not turn:
                yield found
        if not num:
            raise BadTrace(f"nothing in {origin.trace} can be asked for")


def _rows(origin: Origin, seed: int) -> Iterator[Found]:
    from penstock.traffic.formats import reader_of  # formats knows this reader: late, or a circle
    from penstock.traffic.trace import estimate_tokens

    assert origin.trace is not None
    columns = None if origin.columns is None else parse_columns(origin.columns)
    name, reader = reader_of(origin.trace, origin.format, columns)
    with open_text(origin.trace) as file:
        for found in reader(file, Source(str(origin.trace), estimate_tokens, seed)):
            if isinstance(found, Row) and origin.as_tenant is not None:
                found = found._replace(tenant=origin.as_tenant)
            yield found
