"""`penstock simulate --sweep ... --compare ...`: a grid of simulations. What its flags say, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from penstock.core.types import SCHEMA
from penstock.lab.grid import grid
from penstock.lab.points import Result
from penstock.lab.sweep import Planned, Sweep, Traffic, plan, run_sweep
from penstock.lab.sweep_files import (
    PARQUET,
    REPORT,
    STORE,
    check_extra,
    write_parquet,
    write_report,
)
from penstock.lab.sweep_rows import Row
from penstock.report.progress import Bar
from penstock.report.sweeps import table, words
from penstock.traffic.promises import slo_of
from penstock.verbs import refuse

if TYPE_CHECKING:
    from penstock.verbs.simulate import Asked

WIDTH = 200  # of what goes to a file


def run_asked(asked: Asked) -> None:
    """Run the grid that these flags ask for."""
    single = {"--log": asked.log, "--report": asked.report}
    refuse(single, "belongs to a single run", "leave it out: a sweep writes report.html itself")
    axes = grid(asked.sweep or (), asked.compare or ())
    load = next((axis.name for axis in axes if axis.is_load), None)
    if load is not None:
        is_faster = asked.speed != 1.0 and load != "poisson"
        same = {"--rate": asked.rate if load != "speed" else None, "--speed": is_faster}
        refuse(same, f"and --sweep {load} both state the load", "leave one of them out")
    traffic = Traffic(
        columns=asked.columns,
        limit=asked.limit,
        speed=asked.speed,
        rate_per_s=asked.rate,
        slo=slo_of(ttft_s=asked.slo_ttft, tpot_s=asked.slo_tpot),
    )
    sweep = Sweep(
        config=asked.config,
        trace=asked.trace,
        axes=axes,
        sets=asked.sets or (),
        seed=asked.seed,
        num_seeds=1 if asked.seeds is None else asked.seeds,
        model=asked.model,
        traffic=traffic,
    )
    _run_and_tell(sweep, asked)


def _run_and_tell(sweep: Sweep, asked: Asked) -> None:
    """Run it, print what came out, leave the files. Ends with 1 when a point failed."""
    check_extra()
    folder = asked.out or Path("results") / f"{sweep.config.stem}-{sweep.trace.stem}"
    planned = plan(sweep)
    rows = _run(sweep, asked, planned, folder)
    variants = len({each.spot.variant for each in planned})
    subtitle = f"{sweep.config} on {sweep.trace}: {len(rows)} points, {variants} variants"
    files = [
        write_parquet(rows, folder / PARQUET),
        write_report(rows, folder / REPORT, subtitle=subtitle),
    ]
    if asked.is_json:
        typer.echo(json.dumps(_told(sweep, rows, files), allow_nan=False))
    else:
        _print(subtitle, rows, files)
    failed = [row for row in rows if row["error"] is not None]
    if failed:
        typer.echo(f"penstock simulate: {len(failed)} of {len(rows)} points failed", err=True)
        for row in failed[:3]:
            typer.echo(f"  {row['variant']}, seed {row['seed']}: {row['error']}", err=True)
        raise typer.Exit(1)


def _run(sweep: Sweep, asked: Asked, planned: Sequence[Planned], folder: Path) -> list[Row]:
    num_done = 0
    store = folder / STORE
    with Bar("sweeping") as bar:

        def on_progress(done: int, total: int, result: Result) -> None:
            nonlocal num_done
            num_done = done
            bar.show(done, total, "kept from before" if result.is_kept else "")

        try:
            return run_sweep(
                planned,
                sweep.trace,
                store=store,
                processes=asked.processes,
                ray=asked.ray,
                on_progress=on_progress,
            )
        except KeyboardInterrupt:
            told = f"stopped: {num_done} of {len(planned)} points are kept in {store}"
            typer.echo(f"penstock simulate: {told}; the same command goes on from there", err=True)
            raise


def _told(sweep: Sweep, rows: Sequence[Row], files: Sequence[Path]) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "is_simulation": True,
        "axes": {axis.name: axis.values for axis in sweep.axes},
        "words": words(rows),
        "rows": rows,
        "files": [str(path) for path in files],
    }


def _print(subtitle: str, rows: Sequence[Row], files: Sequence[Path]) -> None:
    from rich.console import Console

    typer.echo(f"SIMULATED: {subtitle}")
    console = Console()
    wide = console if console.is_terminal else Console(width=WIDTH)
    wide.print(table(rows))
    for text in words(rows):
        typer.echo(text)
    for path in files:
        typer.echo(f"wrote   {path}")
