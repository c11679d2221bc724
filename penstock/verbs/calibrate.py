"""`penstock bench calibrate [MODEL]`: the profile of this machine. A command of penstock.verbs.bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from penstock.lab.calibrate import Calibrated, Timed

EPILOG = (
    "Examples: `penstock bench calibrate --quick`; `penstock bench calibrate /models/Qwen3-0.6B --out qwen.json`; "
    "`penstock bench calibrate --scheduler-only --out schedulers.json`; "
    "`penstock simulate deploy.toml --trace conv.csv --set fleet.0.executor.profile=qwen.json`"
)


def calibrate(  # noqa: PLR0913 - a flag is an argument
    model: Annotated[
        str, typer.Argument(help="A model folder, a Hub name, or the model that comes along.")
    ] = "default",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    weights: Annotated[str, typer.Option(help="stored, or in fewer bits: int8, int4.")] = "stored",
    threads: Annotated[int | None, typer.Option(help="Threads of the engine [torch's].")] = None,
    policy: Annotated[
        str, typer.Option(help="Preset of scheduling policies to time: vllm-v1 or sglang.")
    ] = "vllm-v1",
    log: Annotated[
        Path | None,
        typer.Option(help="Refit from this log of a served replica instead of measuring."),
    ] = None,
    is_quick: Annotated[bool, typer.Option("--quick", help="A coarse grid.")] = False,
    is_scheduler_only: Annotated[
        bool,
        typer.Option(
            "--scheduler-only", help="Time only the scheduler, with every set of policies."
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the profile here.")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what steps and scheduling cost on this machine, and write its profile.

    Runs the real engine over a grid of prefill, decode and mixed steps, fits a linear model with its error on unseen
    steps, times the scheduler by queue length, and asks a real server over HTTP by up to 48 callers. Leave the machine
    alone meanwhile.
    """
    from rich.console import Console
    from rich.progress import Progress

    from penstock.lab.calibrate import Engine, refit, time_schedulers
    from penstock.lab.calibrate import calibrate as measure

    engine = Engine(model=model, device=device, dtype=dtype, weights=weights, threads=threads)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("measuring", total=None)

        def on_stage(stage: str, done: int, of: int) -> None:
            bar.update(task, description=f"measuring: {stage}", completed=done, total=of)

        found: Calibrated | Timed
        if is_scheduler_only:
            found = time_schedulers(out, lambda done, of: on_stage("scheduler", done, of))
        elif log is not None:
            found = refit(log, engine, out=out)
        else:
            found = measure(
                engine,
                policy=policy,
                out=out,
                is_quick=is_quick,
                on_stage=on_stage,
            )
    typer.echo(json.dumps(found.to_dict()) if is_json else str(found))
