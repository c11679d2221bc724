"""`penstock simulate [CONFIG] --trace FILE`: a deployment on a trace in virtual time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from penstock.lab.play import Played
    from penstock.lab.simulate import Simulated
    from penstock.traffic import Trace

EPILOG = (
    "Examples: `penstock simulate examples/azure_a100.toml --trace data/azure_2023_conv_200.csv`; "
    "`penstock simulate deploy.toml --trace conv.csv --slo-ttft 1 --set fleet.0.replicas=8 --log run.jsonl`"
)
app = typer.Typer()
TICK = 50  # requests between two updates of the progress bar


@app.command(epilog=EPILOG, no_args_is_help=True)
def simulate(  # noqa: PLR0913 - a flag is an argument
    config: Annotated[Path, typer.Argument(help="TOML file of the deployment.")],
    trace: Annotated[
        Path, typer.Option(help="File with the traffic: Azure, Mooncake, BurstGPT or ShareGPT.")
    ],
    limit: Annotated[int | None, typer.Option(help="Play only so many requests.")] = None,
    speed: Annotated[float, typer.Option(help="Play the trace so many times as fast.")] = 1.0,
    rate: Annotated[
        float | None,
        typer.Option(help="Poisson arrivals, requests a second, in place of the trace's times."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model that requests ask for [the first fleet's].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all chance [the file's, or 0].")] = None,
    slo_ttft: Annotated[float | None, typer.Option(help="Promised time to first token, s.")] = None,
    slo_tpot: Annotated[
        float | None, typer.Option(help="Promised time per later token, s.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, e.g. fleet.0.replicas=2.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Write the event log here.")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a deployment on a trace in virtual time, and report what it would have done.

    The scheduling, routing and memory code is the one that serves; step times come from a cost model. Same arguments,
    same events: the digest names the run.
    """
    from penstock.assemble import load_config
    from penstock.core.types import Slo
    from penstock.lab.simulate import simulate as run_simulation
    from penstock.traffic import open_trace

    built = load_config(config, sets=sets or (), flags={"seed": seed})
    played = open_trace(
        trace,
        limit=limit,
        speed=speed,
        rate_per_s=rate,
        seed=built.seed,
        model=model or built.fleet[0].served_name,
        slo=Slo(ttft_s=slo_ttft, tpot_s=slo_tpot),
    )
    with _progress(played) as on_progress:
        found = run_simulation(built, played, log_path=log, on_progress=on_progress)
    if is_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _print(found)
    if not found.figures.all.num_finished:
        raise typer.Exit(1)


@contextmanager
def _progress(trace: Trace) -> Iterator[Callable[[Played], None]]:
    """A bar on stderr, when that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("simulating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=trace.limit, told="")

        def on_progress(played: Played) -> None:
            if played.num_sent % TICK == 0:
                under_way = played.num_sent - played.num_served - sum(played.errors.values())
                bar.update(task, completed=played.num_sent, told=f"{under_way} under way")

        yield on_progress


def _print(found: Simulated) -> None:
    from penstock.report.table import print_figures

    names = ", ".join(source.fleet for source in found.sources)
    print_figures(found.figures, f"SIMULATED: {names}, virtual time")
    for source in found.sources:
        typer.echo(f"source  {source}")
    typer.echo(f"trace   {found.trace}")
    typer.echo(f"digest  {found.digest} of {found.num_events:,} events, seed {found.seed}")
    if found.log is not None:
        typer.echo(f"log     {found.log}")
    typer.echo(f"took    {found.wall_s:.2f} s")
