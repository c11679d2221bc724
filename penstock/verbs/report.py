"""`penstock report LOG...`: what happened in a run, for people and for other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from penstock.report.page import Page
    from penstock.report.runs import Run

EPILOG = (
    "Examples: `penstock simulate examples/azure_a100.toml --trace data/azure_2023_conv_200.csv --log run.jsonl`, then "
    "`penstock report run.jsonl --out report.html`; `penstock report run.jsonl --request azure_2023_conv_200-107`; "
    "`penstock report low.jsonl high.jsonl --out both.html`; `penstock report logs/ --perfetto trace.json`"
)
app = typer.Typer()


@app.command(epilog=EPILOG, no_args_is_help=True)
def report(  # noqa: PLR0913 - a flag is an argument
    logs: Annotated[
        list[Path],
        typer.Argument(
            help="Event logs, a run each; a folder is one run whose processes each wrote a log, or a sweep's results."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Write the report here: one HTML file that needs nothing else."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the same as JSON here; - is stdout.")
    ] = None,
    perfetto: Annotated[
        Path | None,
        typer.Option(
            help="Write the first run as a trace for ui.perfetto.dev or chrome://tracing."
        ),
    ] = None,
    otel: Annotated[
        str | None,
        typer.Option(
            help="Send the first run as OpenTelemetry traces to this OTLP/HTTP URL, or write them to this file."
        ),
    ] = None,
    request: Annotated[
        list[str] | None, typer.Option(help="Say why this request took so long; may be repeated.")
    ] = None,
    title: Annotated[str, typer.Option(help="The report's title.")] = "",
) -> None:
    """Show what a run did: promises kept, latencies, batches and memory over time, and why slow answers were slow.

    Prints tables; --out writes them with charts as one HTML file. --request tells the life of a request in words.
    """
    from penstock.report.console import print_page

    page = _page(logs, tuple(request or ()), perfetto=perfetto, otel=otel, title=title)
    if out is not None:
        from penstock.report.html import write

        typer.echo(f"report    {write(page, out)}", err=True)
    if json_file is not None:
        _write_json(page.to_dict(), json_file)
    if str(json_file) != "-":
        print_page(page.lives() if request else page)


def _page(
    logs: list[Path],
    asked: tuple[str, ...],
    *,
    perfetto: Path | None,
    otel: str | None,
    title: str,
) -> Page:
    """The page of a sweep, or of runs, whose first is exported besides."""
    from penstock.lab.report import is_sweep, page_of_sweep, report_of, runs_of
    from penstock.report.progress import Bar

    sweep = next(filter(is_sweep, logs), None)
    if sweep is not None:
        flags = {"--perfetto": perfetto, "--otel": otel, "--request": asked}
        _refuse_for_sweeps(sweep, len(logs), flags)
        return page_of_sweep(sweep, title=title)
    runs = runs_of(logs)
    with Bar("reading events") as bar:
        page = report_of(
            runs, title=title, asked=asked, on_progress=lambda num: bar.show(num, None)
        )
    _export(runs[0], perfetto, otel)
    return page


def _export(run: Run, perfetto: Path | None, otel: str | None) -> None:
    if perfetto is not None:
        from penstock.report.perfetto import write_trace

        typer.echo(f"perfetto  {perfetto}: {write_trace(run, perfetto):,} events", err=True)
    if otel is not None:
        from penstock.report.otel import export

        typer.echo(f"otel      {otel}: {export(run, otel):,} spans", err=True)


def _refuse_for_sweeps(sweep: Path, num_logs: int, flags: Mapping[str, object]) -> None:
    from penstock.core.errors import BadConfig

    if num_logs > 1:
        raise BadConfig(
            f"{sweep} holds a sweep, which is reported alone", hint="leave the other logs out"
        )
    given = [name for name, value in flags.items() if value]
    if given:
        raise BadConfig(
            f"{given[0]} needs an event log, and {sweep} holds the figures of a sweep",
            hint="run the point you mean with `penstock simulate ... --log run.jsonl`",
        )


def _write_json(told: dict[str, object], path: Path) -> None:
    from penstock.report.files import write_text

    text = json.dumps(told, allow_nan=False)
    if str(path) == "-":
        typer.echo(text)
    else:
        write_text(path, text + "\n")
