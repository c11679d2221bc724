"""ServeGen's clients, replayed: each client is a renewal process per window with its own lengths, all merged by time.

A folder holds two files a client (`client-3-*` or, as published, `chunk-3-*`):
- `-trace.csv`, no header: start of the window (s), rate (1/s), CV, Gamma or Weibull or nothing, shape, scale. Windows
  are 600 s. The rate is a count over the window, so it is followed; of the law only the shape is taken (`renewal`
  says why). A window without a law has no arrivals.
- `-dataset.json`: start of a span (6 h) -> input_tokens, output_tokens, each a table of tokens -> probability written
  as text. A span without tables takes those of the last span before it that has some, else of the first.
  `reason_ratio` and the tables of other media are not read.

Rules. The tenant is the client. Prompt and output are drawn apart, as published. `counts="exact"` keeps every published
count; "renewal" draws it. Windows are made one after the other for all clients and sorted, so memory holds one window
whatever the length; each client draws from streams of its own, so leaving one out changes no other. Instants begin at
0 at `start_hour`.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import BadConfig, BadTrace
from penstock.traffic.lengths import weighted
from penstock.traffic.process import Floats, generator, rounded
from penstock.traffic.renewal import Counts, Law, in_window
from penstock.traffic.rows import Row, open_text

NAMES = re.compile(r"(?:client|chunk)-(\d+)-trace\.csv")
SUFFIX = "-trace.csv"
FAMILIES = {"Gamma": "gamma", "Weibull": "weibull"}
SILENT = Law(rate_per_s=0.0)
Table = tuple[NDArray[np.int64], Floats]


@dataclass(slots=True)
class Client:
    """One client. `laws` are per window from time 0; `spans` are (start, prompt table, output table) as text."""

    name: str
    window_s: float
    laws: tuple[Law, ...]
    spans: list[tuple[float, str, str]]
    _tables: dict[int, tuple[Table, Table]] = field(default_factory=dict)

    def mean_rate_per_s(self, first: int, end: int) -> float:
        """Arrivals a second over the windows first .. end-1."""
        return math.fsum(law.rate_per_s for law in self.laws[first:end]) / max(1, end - first)

    def tables_at(self, at_s: float) -> tuple[Table, Table]:
        """The tables of prompt and output tokens in force at a time."""
        before = [place for place, span in enumerate(self.spans) if span[0] <= at_s]
        place = before[-1] if before else 0
        if place not in self._tables:
            self._tables[place] = (_table(self.spans[place][1]), _table(self.spans[place][2]))
        return self._tables[place]


def _table(text: str) -> Table:
    found = ast.literal_eval(text)
    return np.array(list(found), np.int64), np.array(list(found.values()), np.float64)


def read_laws(path: Path) -> tuple[float, tuple[Law, ...]]:
    """(window, a law per window) of a client's `-trace.csv`. Raises BadTrace with the line."""
    starts, laws = [], []
    with open_text(path) as file:
        for number, cells in enumerate(csv.reader(file), 1):
            try:
                start, rate, _, family, shape, _ = cells
                starts.append(float(start))
                is_silent = not family or float(rate) == 0
                law = (
                    SILENT
                    if is_silent
                    else Law(
                        rate_per_s=float(rate),
                        shape=float(shape),
                        family=FAMILIES[family],  # type: ignore[arg-type]
                    )
                )
            except (KeyError, ValueError):
                raise BadTrace(
                    f"{path}, line {number}: {','.join(cells)[:80]!r} is no window",
                    hint="a line is: start, rate, CV, Gamma or Weibull or nothing, shape, scale",
                ) from None
            laws.append(law)
    if len(starts) < 2:
        raise BadTrace(f"{path} has fewer than two windows")
    window_s = starts[1] - starts[0]
    if window_s <= 0 or not np.allclose(np.diff(starts), window_s) or starts[0] != 0:
        raise BadTrace(f"{path}: windows must follow each other evenly from 0")
    return window_s, tuple(laws)


def read_spans(path: Path) -> list[tuple[float, str, str]]:
    """The spans of a client's `-dataset.json` that have tables. Raises BadTrace."""
    try:
        with open_text(path) as file:
            found = json.load(file)
        spans = [
            (float(start), each["input_tokens"], each["output_tokens"])
            for start, each in found.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadTrace(
            f"{path} is no table of lengths",
            hint="it is JSON: start of span -> input_tokens, output_tokens, each tokens -> probability",
        ) from None
    kept = sorted(span for span in spans if min(len(span[1]), len(span[2])) > len("{}"))
    if not kept:
        raise BadTrace(f"{path} has no span with lengths")
    return kept


def read_client(trace: Path) -> Client:
    """The client of a `-trace.csv`, its `-dataset.json` beside it."""
    window_s, laws = read_laws(trace)
    name = trace.name.removesuffix(SUFFIX)
    dataset = trace.with_name(f"{name}-dataset.json")
    return Client(name, window_s, laws, read_spans(dataset))


def trace_files(folder: Path) -> list[Path]:
    """The clients' files by number. Raises BadTrace when there are none."""
    found = [
        (match, path)
        for path in folder.glob("*-trace.csv")
        if (match := NAMES.fullmatch(path.name))
    ]
    if not found:
        raise BadTrace(
            f"{folder} holds no ServeGen clients",
            hint="it should hold client-0-trace.csv, client-0-dataset.json and so on",
        )
    return [path for _, path in sorted(found, key=lambda pair: int(pair[0][1]))]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeGen:
    """Which clients to replay, from when, for how long and how fast.

    rate_per_s: the mean rate of all together over the span taken, in place of the published one (rates are scaled,
    shapes kept). clients: names to take. num_clients: take only so many, the busiest in the span. duration_s: None
    plays to the end of the shortest file.
    """

    folder: Path
    start_hour: float = 0.0
    duration_s: float | None = None
    rate_per_s: float | None = None
    clients: tuple[str, ...] = ()
    num_clients: int | None = None
    counts: Counts = "exact"

    def __post_init__(self) -> None:
        for name in ("duration_s", "rate_per_s", "num_clients"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not self.start_hour >= 0:
            raise ValueError(f"start_hour must be zero or more, got {self.start_hour}")

    def open(self) -> Replayed:
        """Read the clients. Raises BadTrace or BadConfig."""
        files = {path.name.removesuffix(SUFFIX): path for path in trace_files(self.folder)}
        if missing := set(self.clients) - set(files):
            raise BadConfig(
                f"{self.folder} has no client {min(missing)!r}",
                hint=f"it has {', '.join(list(files)[:8])} ...",
            )
        clients = [read_client(files[name]) for name in files if name in (self.clients or files)]
        if len({client.window_s for client in clients}) > 1:
            raise BadTrace(f"the clients of {self.folder} have windows of different lengths")
        return self._played(clients)

    def _played(self, clients: list[Client]) -> Replayed:
        window_s = clients[0].window_s
        first = int(self.start_hour * 3600 // window_s)
        offset_s = self.start_hour * 3600 - first * window_s
        have_s = min(len(client.laws) for client in clients) * window_s - self.start_hour * 3600
        duration_s = self.duration_s or have_s
        if have_s < duration_s or have_s <= 0:
            raise BadConfig(
                f"{self.folder} has {max(0.0, have_s) / 3600:g} h from hour {self.start_hour:g} on, "
                f"not {duration_s / 3600:g} h"
            )
        end = first + math.ceil((offset_s + duration_s) / window_s)
        busiest = sorted(clients, key=lambda client: -client.mean_rate_per_s(first, end))
        chosen = [
            client for client in busiest[: self.num_clients] if client.mean_rate_per_s(first, end)
        ]
        rate = math.fsum(client.mean_rate_per_s(first, end) for client in chosen)
        if not chosen:
            raise BadConfig(f"the chosen clients of {self.folder} send nothing in that span")
        scale = 1.0 if self.rate_per_s is None else self.rate_per_s / rate
        return Replayed(chosen, first, end, offset_s, duration_s, scale, self.counts)


@dataclass(slots=True)
class Replayed:
    """Clients that have been read, the busiest first, ready to play again and again: `rows(seed)`."""

    clients: list[Client]
    first: int
    end: int
    offset_s: float
    duration_s: float
    scale: float
    counts: Counts

    @property
    def mean_rate_per_s(self) -> float:
        """Arrivals a second of all clients over the windows played."""
        rates = (client.mean_rate_per_s(self.first, self.end) for client in self.clients)
        return math.fsum(rates) * self.scale

    def windows(self, seed: int) -> Iterator[tuple[Floats, NDArray[np.int64], NDArray[np.int64]]]:
        """Per window, sorted by time: instants, (prompt, output) rows, and the client's place in `clients`."""
        streams = [
            (
                generator(seed, "servegen", client.name),
                generator(seed, "servegen", client.name, "lengths"),
            )
            for client in self.clients
        ]
        window_s = self.clients[0].window_s
        for number in range(self.first, self.end):
            parts = [
                self._window(client, number, *streams[place])
                for place, client in enumerate(self.clients)
            ]
            at = np.concatenate([part[0] for part in parts]) + (number - self.first) * window_s
            owners = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
            order = np.argsort(at, kind="stable")
            order = order[
                (at[order] >= self.offset_s) & (at[order] < self.offset_s + self.duration_s)
            ]
            sizes = np.concatenate([part[1] for part in parts])
            yield rounded(at[order] - self.offset_s), sizes[order], owners[order]

    def _window(
        self, client: Client, number: int, rng: np.random.Generator, lengths: np.random.Generator
    ) -> tuple[Floats, NDArray[np.int64]]:
        law = client.laws[number]
        if law.rate_per_s == 0:
            return np.empty(0), np.empty((0, 2), np.int64)
        scaled = dataclasses.replace(law, rate_per_s=law.rate_per_s * self.scale)
        at = in_window(rng, scaled, client.window_s, self.counts)
        tables = client.tables_at(number * client.window_s)
        drawn = [weighted(*table, lengths.random(len(at))) for table in tables]
        return at, np.maximum(np.stack(drawn, axis=1), 1)

    def rows(self, seed: int) -> Iterator[Row]:
        """Requests in time order; `at_s` counts from the start hour."""
        names = [client.name for client in self.clients]
        for at, sizes, owners in self.windows(seed):
            tenants = [names[owner] for owner in owners.tolist()]
            prompts, outputs = sizes.T.tolist() if len(sizes) else ([], [])
            yield from map(Row, at.tolist(), prompts, outputs, tenants)
