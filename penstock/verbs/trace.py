"""`penstock trace card|generate|fit`: look at a trace, write one from a workload, fit a generator to one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.core.errors import missing_extra

if TYPE_CHECKING:
    from penstock.traffic import Trace
    from penstock.traffic.fidelity import Fidelity

TICK = 500  # requests between two updates of the progress bar
LINE_EVERY = 200  # updates to a line, where no bar can be shown
CARD_EPILOG = (
    "Examples: `penstock trace card data/azure_2023_conv_200.csv`; `penstock trace card workload.toml --plot a.png`; "
    "`penstock trace card mine.csv --columns arrival=ts,prompt=in_tokens,output=out_tokens --json`"
)
GENERATE_EPILOG = (
    "Examples: `penstock trace generate workload.toml --out day.jsonl`; "
    "`penstock trace generate workload.toml --out day.csv --seed 3 --limit 10000`"
)
FIT_EPILOG = (
    "Examples: `penstock trace fit conv.csv`; `penstock trace fit conv.csv --out model.json`; "
    "`penstock trace fit conv.csv --out workload.toml && penstock trace card workload.toml`"
)
app = typer.Typer(
    help="Look at a trace, generate one, fit a generator to one.", no_args_is_help=True
)

File = Annotated[Path, typer.Argument(help="A trace file of any format, or a workload (.toml).")]
Format = Annotated[str | None, typer.Option(help="Format of the trace [recognised].")]
ColumnsFlag = Annotated[
    str | None, typer.Option(help="Of a CSV of your own: arrival=ts,prompt=in,output=out,...")
]
Limit = Annotated[int | None, typer.Option(help="Read only so many requests.")]
Speed = Annotated[float, typer.Option(help="Play the trace so many times as fast.")]
Rate = Annotated[
    float | None,
    typer.Option(help="Mean rate, requests a second: Poisson arrivals, but in workloads."),
]
Seed = Annotated[int, typer.Option(help="Of all chance: in a workload, in Poisson arrivals.")]
IsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("card", epilog=CARD_EPILOG, no_args_is_help=True)
def card(  # noqa: PLR0913 - a flag is an argument
    file: File,
    format: Format = None,
    columns: ColumnsFlag = None,
    limit: Limit = None,
    speed: Speed = 1.0,
    rate: Rate = None,
    seed: Seed = 0,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here (PNG).")] = None,
    is_json: IsJson = False,
) -> None:
    """What a trace holds: rows kept and dropped, rate, burstiness, lengths, what prompts share, who calls."""
    from penstock.report.card import plot_card, print_card
    from penstock.traffic.card import card_of

    if plot is not None and find_spec("matplotlib") is None:  # not after the reading
        raise missing_extra("matplotlib", "plot")
    trace = _open(
        file, format=format, columns=columns, limit=limit, speed=speed, rate=rate, seed=seed
    )
    with _bar("reading", limit) as show:
        found = card_of(trace, show)
    if plot is not None:
        plot_card(found, plot)
    if is_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        print_card(found)


@app.command("generate", epilog=GENERATE_EPILOG, no_args_is_help=True)
def generate(  # noqa: PLR0913 - a flag is an argument
    file: File,
    out: Annotated[Path, typer.Option(help="Trace to write: .jsonl keeps all, .csv the basics.")],
    format: Format = None,
    columns: ColumnsFlag = None,
    limit: Limit = None,
    speed: Speed = 1.0,
    rate: Rate = None,
    seed: Seed = 0,
    is_json: IsJson = False,
) -> None:
    """Write what a workload makes as a trace that can be replayed, and print its card."""
    from penstock.report.card import print_card
    from penstock.traffic import open_trace
    from penstock.traffic.card import card_of
    from penstock.traffic.written import write_trace

    trace = _open(
        file, format=format, columns=columns, limit=limit, speed=speed, rate=rate, seed=seed
    )
    with _bar("written", limit) as show:
        write_trace(trace, out, show)
    meta = trace.meta
    with _bar("read back", meta.rows_kept) as show:
        found = card_of(open_trace(out), show)
    if is_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
        return
    print_card(found)
    typer.echo(f"from    {meta}")


@app.command("fit", epilog=FIT_EPILOG, no_args_is_help=True)
def fit(  # noqa: PLR0913 - a flag is an argument
    file: File,
    format: Format = None,
    columns: ColumnsFlag = None,
    limit: Limit = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the model (.json), or it and a workload (.toml).")
    ] = None,
    window: Annotated[float, typer.Option(help="Seconds that one law of gaps holds for.")] = 60.0,
    lengths: Annotated[
        str, typer.Option(help="Law of lengths: empirical, lognormal or zipf.")
    ] = "empirical",
    seeds: Annotated[int, typer.Option(help="Samples to draw for the comparison.")] = 5,
    is_json: IsJson = False,
) -> None:
    """Fit a generator (Gamma or Weibull gaps a window, lengths, conversations), and say how true it is."""
    from penstock.traffic.fitted import fit_trace, write_fit

    trace = _open(file, format=format, columns=columns, limit=limit)
    with _bar("drawing samples", seeds) as show:
        model, found = fit_trace(
            trace, window_s=window, lengths=lengths, num_seeds=seeds, on_progress=show
        )
    paths = [] if out is None else write_fit(model, out, span_s=trace.meta.last_at_s)
    _print_fit(trace, found, paths, is_json)


def _print_fit(trace: Trace, found: Fidelity, paths: list[Path], is_json: bool) -> None:
    if is_json:
        figures = [
            {name: None if value != value else value for name, value in figure.items()}  # no NaN
            for figure in found.table()
        ]
        told = {"trace": str(trace.path), "is_met": found.is_met, "figures": figures}
        typer.echo(json.dumps(told, allow_nan=False))
        return
    typer.echo(f"fitted on {trace.meta}")
    typer.echo(str(found))
    for path in paths:
        typer.echo(f"written {path}")


def _open(  # noqa: PLR0913 - flags of three commands
    file: Path,
    *,
    format: str | None,
    columns: str | None,
    limit: int | None,
    speed: float = 1.0,
    rate: float | None = None,
    seed: int = 0,
) -> Trace:
    from penstock.traffic import open_trace, parse_columns

    return open_trace(
        file,
        format=format,
        columns=None if columns is None else parse_columns(columns),
        limit=limit,
        speed=speed,
        rate_per_s=rate,
        seed=seed,
    )


@contextmanager
def _bar(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar, as a function that is told how many are done."""
    from penstock.report.progress import Bar

    with Bar(name, line_every=LINE_EVERY) as bar:
        shown = 0

        def show(done: int) -> None:
            nonlocal shown
            if done - shown >= TICK or done == total:
                shown = done
                bar.show(done, total)

        yield show
