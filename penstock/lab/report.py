"""A report of logs, or of a simulation while it runs: the facts of runs, put into a page.

    page = report_of([Run("a.jsonl")])                                      from logs
    recorder = Recorder(path); found = simulate(..., listeners=[recorder]); recorder.write(found)

What the log does not say itself is read from the configuration in its header: whether times came from a model, from
which, and what the cards cost.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import penstock
from penstock.assemble import Config
from penstock.core.config import build
from penstock.core.errors import BadTrace, PenstockError
from penstock.core.events import Header
from penstock.lab.simulate import Simulated, source_of
from penstock.lab.sweep_files import PARQUET, read_parquet
from penstock.report.card import short
from penstock.report.collect import Collector, Facts
from penstock.report.compose import compose
from penstock.report.files import check_writable
from penstock.report.html import plotly, write
from penstock.report.money import Money, price_of
from penstock.report.page import Page
from penstock.report.runs import Run
from penstock.report.sweep_page import sweep_page
from penstock.report.words import Context
from penstock.traffic.card import Card

TICK = 5000  # events between two calls of on_progress
SIMULATED = "SIMULATED: no hardware ran this. "
OnProgress = Callable[[int], None]


def runs_of(paths: Sequence[Path]) -> list[Run]:
    """A run a path: a log, or the folder of the logs of one deployment. Names are made different where they are not."""
    runs: list[Run] = []
    for path in paths:
        run = Run(path)
        taken = {each.name for each in runs}
        name, number = run.name, 2
        while run.name in taken:
            run.name, number = f"{name}-{number}", number + 1
        runs.append(run)
    return runs


def facts_of(
    run: Run, *, asked: Collection[str] = (), on_progress: OnProgress | None = None
) -> Facts:
    """One pass over a run."""
    collector = Collector(run.name, asked=asked)
    for event in run:
        collector.emit(event)
        if on_progress is not None and collector.num_events % TICK == 0:
            on_progress(collector.num_events)
    return collector.facts(run.notes())


def report_of(
    runs: Sequence[Run],
    *,
    title: str = "",
    asked: Collection[str] = (),
    on_progress: OnProgress | None = None,
) -> Page:
    """The page of one or several runs. Raises BadTrace for a request that none of them knows."""
    found = [facts_of(run, asked=asked, on_progress=on_progress) for run in runs]
    known = {told.request for facts in found for told in facts.asked}
    known |= {request for facts in found for request in facts.refusals}
    for request in asked:
        if request not in known:
            raise BadTrace(
                f"no request {request!r} arrived in {', '.join(str(run.name) for run in runs)}",
                hint="ids stand in the log's arrived events, and in the report's table of the slowest answers",
            )
    return compose(found, context_of(found, title=title))


def is_sweep(path: Path) -> bool:
    """Whether this is the folder of a sweep's results."""
    return (path / PARQUET).is_file()


def page_of_sweep(folder: Path, *, title: str = "") -> Page:
    """The page of a sweep that was kept; see `sweep_files.read_parquet` for what it raises."""
    rows = read_parquet(folder / PARQUET)
    return sweep_page(rows, title=title or "Sweep", subtitle=f"{folder}: {len(rows)} points")


class Recorder(Collector):
    """Listens to a simulation (`listeners=[recorder]`), and then writes its page to `path`.

    Raises MissingExtra and BadConfig at once when a page could not be made in the end.
    """

    def __init__(self, path: Path) -> None:
        plotly()
        check_writable(path, "the report")
        super().__init__(path.stem)
        self.path = path

    def page(self, found: Simulated, card: Card | None = None, *, title: str = "") -> Page:
        facts = self.facts()
        lines = [str(found.trace), *([] if card is None else [short(card)])]
        names = ", ".join(source.fleet for source in found.sources)
        context = context_of(
            [facts],
            title=title or f"{names} under {Path(found.trace.path).name}",
            card=tuple(lines),
            footer=f"digest {found.digest}",
        )
        money = dataclasses.replace(context.money[facts.name], energy_j=found.energy_j)
        return compose([facts], dataclasses.replace(context, money={facts.name: money}))

    def write(self, found: Simulated, card: Card | None = None) -> Path:
        """The path."""
        return write(self.page(found, card), self.path)


def context_of(
    found: Sequence[Facts], *, title: str = "", card: tuple[str, ...] = (), footer: str = ""
) -> Context:
    """What the configurations in the headers say about runs."""
    headers = [header for facts in found for header in facts.headers]
    sources = tuple(dict.fromkeys(line for header in headers for line in sources_of(header)))
    seeds = sorted({header.seed for header in headers})
    versions = sorted({header.version for header in headers if header.version})
    told = [
        f"Penstock {penstock.__version__}",
        f"logs of version {', '.join(versions)}",
        f"seed {', '.join(map(str, seeds))}",
    ]
    return Context(
        title=title,
        banner=_banner(headers),
        sources=sources,
        card=card,
        money={facts.name: _money(facts) for facts in found},
        footer=" · ".join([*told, *([footer] if footer else [])]),
    )


def _money(facts: Facts) -> Money:
    return price_of(facts.headers[0].config) if facts.headers else Money()


def _config(header: Header) -> Config | None:
    """The deployment; None when the header carries none that this version understands."""
    try:
        table = tomllib.loads(header.config)
        return build(Config, table) if table else None
    except (tomllib.TOMLDecodeError, PenstockError):
        return None


def _is_modelled(header: Header) -> bool:
    config = _config(header)
    if header.who == "simulation":
        return True
    return config is not None and any(fleet.executor.kind == "modelled" for fleet in config.fleet)


def _banner(headers: Sequence[Header]) -> str:
    modelled = [_is_modelled(header) for header in headers]
    if not any(modelled):
        return ""
    digests = ", ".join(dict.fromkeys(header.profile for header in headers if header.profile))
    told = (
        SIMULATED if all(modelled) else "SIMULATED IN PART: some of these runs used no hardware. "
    )
    return (
        told
        + "Step times come from a cost model"
        + (f" [{digests}]" if digests else "")
        + "; decisions are those of the real scheduler."
    )


def sources_of(header: Header) -> list[str]:
    """Where the step times of a log come from, a line a fleet."""
    config = _config(header)
    if config is None:
        return []
    if not _is_modelled(header):
        return [
            f"{fleet.served_name}: measured while it served ({fleet.executor.kind} on {fleet.executor.device})"
            for fleet in config.fleet
        ]
    try:
        return [str(source_of(fleet)) for fleet in config.fleet]
    except PenstockError:  # a file it names is not here any more
        return [
            f"{fleet.served_name}: a cost model that this machine cannot load again"
            for fleet in config.fleet
        ]
