"""One bench: probe a server, open the trace to its measure, drive it, and say what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from penstock.core.types import SCHEMA, Slo
from penstock.lab.client import Client, Server
from penstock.lab.drive import Driven, Driver
from penstock.lab.prompts import Composer, Lexicon, lexicon_of
from penstock.lab.workflow import WorkflowFigures
from penstock.report.summary import Figures, Spread
from penstock.traffic import Columns, Trace, TraceMeta, open_trace
from penstock.traffic.card import Card, Watched
from penstock.traffic.promises import Promise

MAX_COUNTED_BYTES = 1 << 25
OnTick = Callable[[Driven, int | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What to measure and how. `slo` with no bounds judges nothing: every answer that ends has met it.

    `promises` are for tenants of their own; see traffic.promises.
    """

    url: str
    trace: Path
    format: str | None = None
    columns: Columns | None = None
    limit: int | None = None
    speed: float = 1.0
    rate_per_s: float | None = None
    model: str | None = None
    api_key: str | None = None
    is_chat: bool = False
    slo: Slo = Slo()
    promises: tuple[Promise, ...] = ()
    concurrency_cap: int | None = None
    timeout_s: float = 600.0
    tokenizer: Path | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Benched:
    """What came of it. `is_whole` False: it was stopped before the trace ended."""

    url: str
    model: str
    slo: Slo
    promises: tuple[Promise, ...]
    trace: TraceMeta
    server: Server
    lexicon: str
    is_whole: bool
    figures: Figures
    lateness: Spread
    driven: Driven
    workflows: dict[str, WorkflowFigures]
    card: Card  # of what was sent

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "schema": SCHEMA,
            "url": self.url,
            "model": self.model,
            "is_whole": self.is_whole,
            "slo": dataclasses.asdict(self.slo),
            "promises": [dataclasses.asdict(promise) for promise in self.promises],
            "trace": dataclasses.asdict(self.trace),
            "fields_taken": list(self.server.extras),
            "prompts_sized_by": self.lexicon,
            "client_lateness_s": dataclasses.asdict(self.lateness),
            "card": self.card.to_dict(),
            "figures": self.figures.to_dict(),
            "workflows": {kind: dataclasses.asdict(each) for kind, each in self.workflows.items()},
        }


async def bench(wanted: Bench, on_tick: OnTick | None = None) -> Benched:
    """Measure. `on_tick` hears several times a second what was measured and how many requests there are, if known.

    Raises PenstockError when the server or the trace cannot be used. Cancelling reports what there is."""
    _raise_file_limit()
    async with Client(
        wanted.url,
        api_key=wanted.api_key,
        model=wanted.model,
        is_chat=wanted.is_chat,
        timeout_s=wanted.timeout_s,
    ) as client:
        trace = _open(
            wanted, None
        )  # a trace that cannot be read is told before the server is troubled
        server = await client.probe()
        lexicon = await lexicon_of(client, wanted.tokenizer)
        if server.max_context is not None:
            trace = _open(wanted, server.max_context)
        num_total = None if on_tick is None else _count(wanted, server.max_context)
        driver = Driver(
            client,
            Composer(lexicon, wanted.seed),
            concurrency_cap=wanted.concurrency_cap,
            on_tick=None if on_tick is None else lambda driven: on_tick(driven, num_total),
        )
        watched, is_whole = Watched(trace), False
        # Ctrl-C cancels this task: what was measured is still worth a report.
        with contextlib.suppress(asyncio.CancelledError):
            await driver.run(watched)
            is_whole = True
        return _benched(wanted, watched, server, lexicon, driver, is_whole)


def _open(wanted: Bench, max_context: int | None) -> Trace:
    return open_trace(
        wanted.trace,
        format=wanted.format,
        columns=wanted.columns,
        limit=wanted.limit,
        speed=wanted.speed,
        seed=wanted.seed,
        rate_per_s=wanted.rate_per_s,
        max_tokens="trace",
        max_context=max_context,
        slo=wanted.slo,
        promises=wanted.promises,
    )


def _count(wanted: Bench, max_context: int | None) -> int | None:
    """How many requests the trace holds, for a bar; a large file is not read twice for that."""
    if wanted.trace.stat().st_size > MAX_COUNTED_BYTES:
        return wanted.limit
    return sum(1 for _ in _open(wanted, max_context))


def _benched(
    wanted: Bench, trace: Watched, server: Server, lexicon: Lexicon, driver: Driver, is_whole: bool
) -> Benched:
    driven, notes = driver.driven, []
    if not is_whole:
        notes.append("stopped before the trace ended")
    if not lexicon.is_exact:
        notes.append(f"prompts are sized by {lexicon.source}")
    if "ignore_eos" not in server.extras:
        notes.append("the server takes no ignore_eos: answers may end before their traced length")
    if trace.meta.drops:
        told = ", ".join(f"{count} ({why})" for why, count in trace.meta.reasons())
        notes.append(f"rows of the trace left out: {told}")
    return Benched(
        url=wanted.url,
        model=server.model,
        slo=wanted.slo,
        promises=wanted.promises,
        trace=trace.meta,
        server=server,
        lexicon=lexicon.source,
        is_whole=is_whole,
        figures=driven.figures(tuple(notes)),
        lateness=driven.lateness(),
        driven=driven,
        workflows=driver.workflows.figures(),
        card=trace.card(),
    )


def _raise_file_limit() -> None:
    """Every request under way holds a socket: take as many files as the system grants."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
