"""`penstock simulate [CONFIG] --trace FILE`: a deployment on a trace in virtual time."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.verbs import fail_loudly, refuse

if TYPE_CHECKING:
    from penstock.lab.play import Played
    from penstock.lab.report import Recorder
    from penstock.lab.simulate import Simulated
    from penstock.traffic.card import Card

EPILOG = (
    "Examples: `penstock simulate examples/azure_a100.toml --trace data/azure_2023_conv_200.csv`; "
    "`penstock simulate deploy.toml --trace conv.csv --slo-ttft 1 --set fleet.0.replicas=8 --log run.jsonl`; "
    "`penstock simulate deploy.toml --trace conv.csv --slo-ttft 1 --report run.html`; "
    "`penstock simulate deploy.toml --trace conv.csv --slo-ttft 1 --sweep rate=0.5:4:0.5 "
    "--compare policy.batch=vllm,sglang`; "
    "`penstock simulate deploy.toml --trace conv.csv --sweep poisson=2,4,8 --sweep replicas=1,2,4 --seeds 5`. "
    "**Sweeps**: values are a list (a,b,c) or a range (from:to:step), the grid is their product. Loads: `rate` "
    "(requests a second, the trace's own times stretched), `poisson` (requests a second, Poisson), `speed`. Else any "
    "path of --set; a short one (replicas, policy.route, cache.block_size) is the first fleet's. A batch policy that a "
    "preset is named after (vllm, sglang) brings the preset's companions: sglang evicts by retraction, vllm-v1 by "
    "recomputation. A sweep that was stopped goes on where it was, from the points that its folder holds."
)
app = typer.Typer()
TICK = 50  # requests between two updates of the progress bar


@app.command(epilog=EPILOG, no_args_is_help=True)
def simulate(  # noqa: PLR0913 - a flag is an argument
    config: Annotated[Path, typer.Argument(help="TOML file of the deployment.")],
    trace: Annotated[
        Path, typer.Option(help="Traffic: a trace, a CSV of your own, or a workload (.toml).")
    ],
    columns: Annotated[
        str | None, typer.Option(help="Of a CSV of your own: arrival=ts,prompt=in,output=out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Play only so many requests.")] = None,
    speed: Annotated[float, typer.Option(help="Play the trace so many times as fast.")] = 1.0,
    rate: Annotated[
        float | None,
        typer.Option(help="Mean rate, requests a second: Poisson arrivals, but in workloads."),
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
    sweep: Annotated[
        list[str] | None, typer.Option(help="Run at each of these: rate=0.5:4:0.5, replicas=1,2.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Variants, each swept: policy.batch=vllm,sglang.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds a point of a sweep [1].")] = None,
    processes: Annotated[int | None, typer.Option(help="Points at once [one a core].")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster that runs the points, or auto.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of a sweep's results [results/CONFIG-TRACE].")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a report of a single run here: one HTML file.")
    ] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a deployment on a trace in virtual time, and report what it would have done.

    The scheduling, routing and memory code is the one that serves; step times come from a cost model. Same arguments,
    same events: the digest names the run.
    """
    asked = Asked(**locals())
    if sweep or compare or seeds is not None:
        from penstock.verbs.sweeping import run_asked

        run_asked(asked)
    else:
        _single(asked)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The flags as they were typed, under the names that `simulate` has for them."""

    config: Path
    trace: Path
    columns: str | None
    limit: int | None
    speed: float
    rate: float | None
    model: str | None
    seed: int | None
    slo_ttft: float | None
    slo_tpot: float | None
    sets: list[str] | None
    log: Path | None
    sweep: list[str] | None
    compare: list[str] | None
    seeds: int | None
    processes: int | None
    ray: str | None
    out: Path | None
    report: Path | None
    is_json: bool


def _single(asked: Asked) -> None:
    gc.disable()  # what is imported is no garbage, and looking for some takes a tenth of the start
    from penstock.assemble import load_config
    from penstock.lab.simulate import simulate as run_simulation
    from penstock.report.files import check_writable
    from penstock.report.progress import Bar
    from penstock.traffic import open_trace, parse_columns
    from penstock.traffic.card import Watched
    from penstock.traffic.promises import slo_of

    gc.enable()
    sweep_flags = {"--processes": asked.processes, "--ray": asked.ray, "--out": asked.out}
    refuse(sweep_flags, "belongs to a sweep", "add --sweep, --compare or --seeds")
    built = load_config(asked.config, sets=asked.sets or (), flags={"seed": asked.seed})
    played = open_trace(
        asked.trace,
        columns=None if asked.columns is None else parse_columns(asked.columns),
        limit=asked.limit,
        speed=asked.speed,
        rate_per_s=asked.rate,
        seed=built.seed,
        model=asked.model or built.fleet[0].served_name,
        slo=slo_of(ttft_s=asked.slo_ttft, tpot_s=asked.slo_tpot),
    )
    if asked.log is not None:
        check_writable(asked.log, "the log")
    with Bar("simulating") as bar:

        def on_progress(now: Played) -> None:
            if now.num_sent % TICK == 0:
                under_way = now.num_sent - now.num_served - sum(now.errors.values())
                bar.show(now.num_sent, asked.limit, f"{under_way} under way")

        watched = Watched(played)
        recorder = _recorder(asked)
        found = run_simulation(
            built,
            watched,
            log_path=asked.log,
            on_progress=on_progress,
            listeners=recorder,
            may_fork=True,
        )
    for one in recorder:
        typer.echo(f"report  {one.write(found, watched.card())}", err=True)
    if asked.is_json:
        told = {**found.to_dict(), "card": watched.card().to_dict()}
        typer.echo(json.dumps(told, allow_nan=False))
    else:
        _print(found, watched.card())
    if not found.figures.all.num_finished:
        fail_loudly("simulate", found.figures.errors, found.played.messages)


def _recorder(asked: Asked) -> list[Recorder]:
    """Whoever listens for --report: nobody without it."""
    if asked.report is None:
        return []
    from penstock.lab.report import Recorder

    return [Recorder(asked.report)]


def _print(found: Simulated, card: Card) -> None:
    from penstock.report.card import short
    from penstock.report.table import print_figures

    names = ", ".join(source.fleet for source in found.sources)
    print_figures(found.figures, f"SIMULATED: {names}, virtual time")
    for source in found.sources:
        typer.echo(f"source  {source}")
    for kind, figures in found.played.workflows.items():
        typer.echo(f"{kind + 's':9}{figures}")
    typer.echo(f"trace   {found.trace}")
    typer.echo(f"card    {short(card)}")
    typer.echo(f"digest  {found.digest} of {found.num_events:,} events, seed {found.seed}")
    if found.log is not None:
        typer.echo(f"log     {found.log}")
    typer.echo(f"took    {found.wall_s:.2f} s")
