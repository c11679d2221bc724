"""A grid of simulations: the same trace under many deployments and loads, run in parallel, compared.

    axes = grid(["rate=1:8:1"], ["policy.batch=vllm,sglang"])
    sweep = Sweep(config=Path("a.toml"), trace=Path("conv.csv"), axes=axes)
    rows = run_sweep(plan(sweep), sweep.trace, store=Path("runs/points.jsonl"))

Rules
- A point is what `penstock simulate` runs with the same settings: same figures, same digest.
- Every configuration of the grid is read and checked before the first point runs.
- `rate` multiplies the trace's own times so that the played requests come at that mean rate, bursts and all; a file
  without times gets Poisson arrivals. Each load plays the same requests.
- Seeds are so many in a row, counted from the configuration's. A seed is for whatever is drawn: Poisson arrivals,
  generated workloads, policies that use chance. A replayed trace under policies that use none is the same for all.
- A row is flat and says what it was run with: settings, digests, versions, and every figure.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.assemble import Config, load_config
from penstock.assemble.print_config import print_config
from penstock.core.config import build
from penstock.core.errors import BadConfig, BadTrace, PenstockError
from penstock.core.types import Slo
from penstock.lab.grid import Axis, Spot, spots
from penstock.lab.points import Json, Point, Result, run_points
from penstock.lab.simulate import simulate, source_of
from penstock.lab.sweep_rows import Row, row_of
from penstock.lab.trace_digest import trace_digest
from penstock.traffic import Trace, open_trace, parse_columns
from penstock.traffic.formats import WORKLOAD
from penstock.traffic.trace import NoArrivals

UNTOLD = ("wall_s", "log")  # what of a simulation is not a function of its settings


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """How the trace is played; names and meanings as in `Trace`, `columns` as typed."""

    columns: str | None = None
    limit: int | None = None
    speed: float = 1.0
    rate_per_s: float | None = None
    model: str = "default"
    slo: Slo = Slo()

    def open(self, trace: Path, seed: int) -> Trace:
        return open_trace(
            trace,
            columns=None if self.columns is None else parse_columns(self.columns),
            limit=self.limit,
            speed=self.speed,
            rate_per_s=self.rate_per_s,
            seed=seed,
            model=self.model,
            slo=self.slo,
        )


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to run. `sets` and `seed` as in load_config. `traffic.model` is replaced when `model` is None."""

    config: Path
    trace: Path
    axes: Sequence[Axis]
    sets: Sequence[str] = ()
    seed: int | None = None
    num_seeds: int = 1
    model: str | None = None
    traffic: Traffic = Traffic()

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise BadConfig(f"seeds must be at least 1, got {self.num_seeds}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One point of the grid. `offered_per_s`: what its load comes to."""

    spot: Spot
    offered_per_s: float
    point: Point


def plan(sweep: Sweep) -> list[Planned]:
    """Every point of the grid. Raises BadConfig, BadModel and BadTrace that name what cannot be run."""
    base = load_config(sweep.config, sets=sweep.sets, flags={"seed": sweep.seed})
    pace = _Pace(sweep)
    planned = []
    for spot in spots(sweep.axes):
        config, digests = _config(sweep, base, spot)
        inputs = {"trace": pace.sha256, **digests}
        model = sweep.model or config.fleet[0].served_name
        for seed in range(config.seed, config.seed + sweep.num_seeds):
            traffic, offered_per_s = pace.of(spot, seed)
            told = dataclasses.replace(traffic, model=model)
            settings = {
                "what": "simulate",
                "config": print_config(dataclasses.replace(config, seed=seed)),
                "trace": sweep.trace.name,
                "traffic": dataclasses.asdict(told),
            }
            point = Point(settings=settings, seed=seed, inputs=inputs)
            planned.append(Planned(spot=spot, offered_per_s=offered_per_s, point=point))
    return planned


def run_sweep(
    planned: Sequence[Planned],
    trace: Path,
    *,
    store: Path | None = None,
    processes: int | None = None,
    ray: str | None = None,
    on_progress: Callable[[int, int, Result], None] | None = None,
) -> list[Row]:
    """A row for every point, in the order of the plan; those that failed have an `error` and no figures."""
    work = functools.partial(run_one, trace=trace.resolve())
    points = [each.point for each in planned]
    results = run_points(
        points, work, store=store, processes=processes, ray=ray, on_progress=on_progress
    )
    return [
        row_of(each.spot, each.offered_per_s, result)
        for each, result in zip(planned, results, strict=True)
    ]


def run_one(point: Point, *, trace: Path) -> Json:
    """The simulation that a point's settings describe."""
    told = point.settings
    assert isinstance(told["config"], str) and isinstance(told["traffic"], dict)
    config = load_config(flags=tomllib.loads(told["config"]))
    found = simulate(config, build(Traffic, told["traffic"]).open(trace, point.seed)).to_dict()
    return {name: value for name, value in found.items() if name not in UNTOLD}


def _config(sweep: Sweep, base: Config, spot: Spot) -> tuple[Config, dict[str, str]]:
    """The configuration of a spot, checked as far as it can be without running it, and the digests of what it reads."""
    try:
        sets = [*sweep.sets, *spot.sets(base)]
        config = load_config(sweep.config, sets=sets, flags={"seed": sweep.seed})
        return config, _digests(config)
    except PenstockError as error:
        where = f"{spot.variant}: " if any(not axis.is_load for axis, _ in spot.values) else ""
        raise type(error)(f"{where}{error.message}", hint=error.hint) from None


def _digests(config: Config) -> dict[str, str]:
    """What a simulation reads beside its configuration: profiles and shapes of models."""
    sources = [source_of(fleet) for fleet in config.fleet]
    found = {f"cost model {i}": source.digest for i, source in enumerate(sources)}
    for i, source in enumerate(sources):
        if source.scheduler_digest is not None:
            found[f"scheduler {i}"] = source.scheduler_digest
    return found


class _Pace:
    """Turns loads into options of the trace."""

    def __init__(self, sweep: Sweep) -> None:
        self._trace, self._traffic = sweep.trace, sweep.traffic
        self._own_rates: dict[int, float | None] = {}
        opened = sweep.traffic.open(sweep.trace, 0)
        self.sha256 = trace_digest(opened)
        self._is_drawn = sweep.traffic.rate_per_s is not None or opened.format == WORKLOAD

    def of(self, spot: Spot, seed: int) -> tuple[Traffic, float]:
        """How the trace is played at a spot's load, and the requests a second that this comes to."""
        kind, load = spot.load or ("speed", self._traffic.speed)
        if kind == "poisson":
            return dataclasses.replace(self._traffic, rate_per_s=load, speed=1.0), load
        own = self._own_rate(seed)
        if kind == "rate" and own is None:
            return dataclasses.replace(self._traffic, rate_per_s=load, speed=1.0), load
        if own is None:
            raise BadTrace(
                f"the trace {self._trace} has no arrival times",
                hint="sweep poisson=..., or state --rate, requests a second",
            )
        if kind == "rate":
            return dataclasses.replace(self._traffic, speed=load / own), load
        return dataclasses.replace(self._traffic, speed=load), own * load

    def _own_rate(self, seed: int) -> float | None:
        """Requests a second at speed 1; None when the file has no times."""
        key = seed if self._is_drawn else 0
        if key not in self._own_rates:
            self._own_rates[key] = self._measured(seed)
        return self._own_rates[key]

    def _measured(self, seed: int) -> float | None:
        trace = dataclasses.replace(self._traffic, speed=1.0).open(self._trace, seed)
        try:
            for _ in trace:
                pass
        except NoArrivals:
            return None
        meta = trace.meta
        if meta.rows_kept < 2 or not meta.last_at_s > 0:
            raise BadTrace(
                f"the trace {self._trace} has no mean rate: {meta.rows_kept} requests in {meta.last_at_s:g} s",
                hint="play more of it, or sweep poisson=...",
            )
        return (meta.rows_kept - 1) / meta.last_at_s
