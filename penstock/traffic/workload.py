"""A workload: a TOML file that says what traffic to make. It stands wherever a trace file does.

    duration_s = 3600                      # or num_requests, or both: the first that is reached
    [arrivals]
    kind = "gamma"                         # see traffic.arrivals
    rate_per_s = 4.0
    cv = 2.0
    [lengths]
    kind = "lognormal"                     # see traffic.lengths
    ...
    [prefix]                               # what prompts share, see traffic.prefix
    [sessions]                             # conversations, see traffic.sessions; or
    [programs]                             # agent programs, see traffic.programs
    [images]                               # that prompts show, see traffic.images
    [failures]                             # see traffic.failures
    [tenants]                              # by skew, or [[tenant]] one by one, see traffic.tenants
    [[service_class]]                      # share, slo, priority
    [[mix]]                                # further sources, each with all of the above
    [model]                                # or trace = "FILE": given callers, see traffic.models

Rules
- A source is arrivals, and callers that arrive. With `trace` in place of `[lengths]`, rows of a trace file are asked
  for in order, at their own instants or at those of `[arrivals]` (then again from the beginning as long as it takes,
  as other prompts). The top of the file is a source itself when it has either of them; `[[mix]]` adds more.
- A `[[tenant]]` states what is different about its callers; what it leaves out is the source's.
- Rows come in time order. Bounds are on arrivals: a conversation that began goes on. num_requests counts calls.
- Everything is drawn from the file's `seed` and the run's: another run seed is another sample of the same workload.
- A stated rate (`--rate`) is a mean rate of arrivals for the whole file: all clocks run faster or slower, and
  burstiness is kept. Paths are relative to the file.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from penstock.core.config import build, load_toml
from penstock.core.errors import BadTrace
from penstock.core.rng import stream
from penstock.traffic.arrivals import arrivals_of
from penstock.traffic.models import model_of
from penstock.traffic.process import mean_rate_of
from penstock.traffic.rows import Drop, Found, Row, Source
from penstock.traffic.sources import Origin, Stream, streams_of

PATH_KEYS = ("path", "folder", "trace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix(Origin):
    """One of several sources."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload(Origin):
    """The whole file."""

    duration_s: float | None = None
    num_requests: int | None = None
    seed: int = 0
    mix: tuple[Mix, ...] = ()

    def __post_init__(self) -> None:
        super(Workload, self).__post_init__()
        if self.duration_s is not None and not self.duration_s > 0:
            raise ValueError(f"duration_s must be positive, got {self.duration_s}")
        if self.num_requests is not None and self.num_requests < 1:
            raise ValueError(f"num_requests must be at least 1, got {self.num_requests}")
        names = [mix.name for mix in self.mix]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two sources of [[mix]] are named {twice!r}")
        idle = next((mix.name for mix in self.mix if not mix.is_source), None)
        if idle is not None or not self.origins():
            told = f"the source {idle!r}" if idle is not None else "a workload"
            raise ValueError(f"{told} needs [arrivals] or a trace")
        if self.duration_s is None and self.num_requests is None:
            if any(origin.is_endless for _, origin in self.origins()):
                raise ValueError("arrivals never end: state duration_s or num_requests")

    def origins(self) -> list[tuple[str, Origin]]:
        """(place in the file, source) of all."""
        top: list[tuple[str, Origin]] = [("", self)] if self.is_source else []
        return [*top, *((f"mix.{mix.name}.", mix) for mix in self.mix)]

    @property
    def mean_rate_per_s(self) -> float:
        """Arrivals a second of all sources; nan when one of them does not say."""
        tables = [
            (table, where)
            for where, origin in self.origins()
            for table in (origin.arrivals, *(tenant.arrivals for tenant in origin.tenant))
        ]
        if any(
            origin.trace is not None and origin.arrivals is None for _, origin in self.origins()
        ):
            return math.nan
        modelled = math.fsum(
            model_of(origin.model, f"{where}model").open().mean_rate_per_s * origin.speed
            for where, origin in self.origins()
            if origin.model is not None
        )
        return modelled + math.fsum(
            mean_rate_of(arrivals_of(table, f"{where}arrivals"))
            for table, where in tables
            if table is not None
        )


def load_workload(path: Path) -> Workload:
    """Raises BadConfig naming the first key that does not fit."""
    table = load_toml(path)
    return build(Workload, _located(table, path.parent), "")


def _located(value: object, folder: Path) -> dict[str, object]:
    """The table with the paths in it taken from the file's folder."""

    def walk(value: object, key: str = "") -> object:
        if isinstance(value, Mapping):
            return {name: walk(each, name) for name, each in value.items()}
        if isinstance(value, list):
            return [walk(each, key) for each in value]
        if key in PATH_KEYS and isinstance(value, str):
            return str(folder / value)
        return value

    located = walk(value)
    assert isinstance(located, dict)
    return located


def check(path: Path) -> None:
    """Raises BadConfig or BadTrace for what can be known to be wrong before anything is made."""
    list(_streams(load_workload(path), 0))


def read(file: TextIO, source: Source) -> Iterator[Found]:
    """What the workload file makes; a Reader like those of traces. `file` itself is read by core.config."""
    workload = load_workload(Path(source.name))
    pace = 1.0
    if source.rate_per_s is not None:
        pace = source.rate_per_s / workload.mean_rate_per_s
        if math.isnan(pace):
            raise BadTrace(
                f"nobody knows the mean rate of {source.name}, so it cannot be set",
                hint="leave out --rate and play it faster or slower with --speed",
            )
    seed = stream(workload.seed, "traffic", "workload", str(source.seed)).getrandbits(63)
    streams = _streams(workload, seed)
    merged = streams[0] if len(streams) == 1 else heapq.merge(*streams, key=lambda pair: pair[0])
    return _bounded(workload, merged, pace)


def _streams(workload: Workload, seed: int) -> list[Stream]:
    return [
        each
        for where, origin in workload.origins()
        for each in streams_of(
            origin, seed=seed, owner=where.removesuffix(".") or "caller", where=where
        )
    ]


def _bounded(
    workload: Workload, found: Iterator[tuple[float, Found]], pace: float
) -> Iterator[Found]:
    """Up to the workload's bounds, `pace` times as fast."""
    num = 0
    for at_s, each in found:
        at_s /= pace
        if workload.duration_s is not None and at_s > workload.duration_s:
            return
        if workload.num_requests is not None and num >= workload.num_requests:
            return
        if isinstance(each, Drop):
            yield each
            continue
        num += 1 if isinstance(each, Row) else len(each.steps)
        yield each if pace == 1.0 else each._replace(at_s=at_s)
