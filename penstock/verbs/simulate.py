"""`penstock simulate [CONFIG] --trace FILE`: a deployment on a trace in virtual time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.verbs import fail_loudly

if TYPE_CHECKING:
    from penstock.lab.play import Played
    from penstock.lab.simulate import Simulated

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
    from penstock.lab.simulate import simulate as run_simulation
    from penstock.report.progress import Bar
    from penstock.traffic import open_trace
    from penstock.traffic.promises import slo_of

    built = load_config(config, sets=sets or (), flags={"seed": seed})
    played = open_trace(
        trace,
        limit=limit,
        speed=speed,
        rate_per_s=rate,
        seed=built.seed,
        model=model or built.fleet[0].served_name,
        slo=slo_of(ttft_s=slo_ttft, tpot_s=slo_tpot),
    )
    with Bar("simulating") as bar:

        def on_progress(now: Played) -> None:
            if now.num_sent % TICK == 0:
                under_way = now.num_sent - now.num_served - sum(now.errors.values())
                bar.show(now.num_sent, limit, f"{under_way} under way")

        found = run_simulation(built, played, log_path=log, on_progress=on_progress)
    if is_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _print(found)
    if not found.figures.all.num_finished:
        fail_loudly("simulate", found.figures.errors, found.played.messages)


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
