"""`penstock bench validate [MODEL]`: the simulator beside this machine. A command of penstock.verbs.bench."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.core.errors import BadConfig, missing_extra

if TYPE_CHECKING:
    from penstock.lab.validate import Validated

EPILOG = (
    "Examples: `penstock bench validate --trace data/azure_2023_conv_200.csv`; "
    "`penstock bench validate --profile here.json --loads 0.5,0.8 --repeats 3 --plot validation.png --out report.json`"
)
TRACES = ("traces/azure_2023_conv.csv", "azure_2023_conv_200.csv")


TraceFile = Annotated[
    Path | None,
    typer.Option(help="File with the traffic [Azure's conversations in $PENSTOCK_DATA or data/]."),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option(help="Of `penstock bench calibrate`; measured anew if it does not fit."),
]
Loads = Annotated[str, typer.Option(help="Shares of the saturation rate, with commas.")]
Limit = Annotated[
    float,
    typer.Option(help="Mark repeats while others took more of this machine's processors."),
]
Policy = Annotated[str, typer.Option(help="Preset of scheduling policies, say vllm-v1.")]
Model = Annotated[
    str, typer.Argument(help="A model folder, a Hub name, or the model that comes along.")
]


def validate(  # noqa: PLR0913 - a flag is an argument
    model: Model = "default",
    trace: TraceFile = None,
    profile: ProfileFile = None,
    loads: Loads = "0.3,0.6,0.9",
    repeats: Annotated[int, typer.Option(help="Benches at each load.", min=1)] = 5,
    requests: Annotated[int, typer.Option(help="Requests of each bench.", min=10)] = 60,
    neighbour_limit: Limit = 0.1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    policy: Policy = "vllm-v1",
    is_quick: Annotated[bool, typer.Option("--quick", help="Calibrate coarsely.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write everything here as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here (PNG).")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict a bench of this machine, run it, and show one beside the other.

    Calibrates (unless --profile fits), starts a real server, finds its saturation, benches it at every load several
    times over HTTP, and simulates the same requests with the same settings. Takes about ten minutes: leave the machine
    alone meanwhile. Ends with 1 when a figure is off by more than the rule allows.
    """
    from penstock.lab.calibrate import Engine
    from penstock.lab.validate import Validation
    from penstock.lab.validate import validate as run
    from penstock.report.progress import Bar

    if plot is not None and find_spec("matplotlib") is None:  # not after the runs
        raise missing_extra("matplotlib", "lab")
    wanted = Validation(
        trace=trace or default_trace(),
        engine=Engine(model=model, device=device, dtype=dtype),
        profile=profile,
        loads=parse_loads(loads),
        repeats=repeats,
        num_requests=requests,
        neighbour_limit=neighbour_limit,
        policy=policy,
        is_quick=is_quick,
    )
    with Bar("validating", line_every=1) as bar:
        found = run(wanted, lambda stage, done, of: bar.show(done, of, stage))
    _report(found, out, plot, is_json)
    if not found.has_passed:
        raise typer.Exit(1)


def _report(found: Validated, out: Path | None, plot: Path | None, is_json: bool) -> None:
    text = json.dumps(found.to_dict(), default=str)
    typer.echo(text if is_json else str(found))
    if out is not None:
        try:
            out.write_text(text + "\n")
        except OSError as error:
            raise BadConfig(f"cannot write {out}: {error.strerror}") from None
    if plot is not None:
        from penstock.lab.validate_plot import plot as draw

        draw(plot, found)


def parse_loads(text: str) -> tuple[float, ...]:
    """Raises BadConfig when they are no shares."""
    try:
        loads = tuple(float(each) for each in text.split(","))
    except ValueError:
        loads = ()
    if not loads or not all(0 < load <= 2 for load in loads) or len(set(loads)) < len(loads):
        raise BadConfig(
            f"--loads are shares of the saturation rate, such as 0.3,0.6,0.9; got {text!r}"
        )
    return loads


def default_trace() -> Path:
    """Azure's conversations where they are at hand. Raises BadConfig."""
    folders = [Path("data"), *(Path(each) for each in [os.environ.get("PENSTOCK_DATA")] if each)]
    for folder in reversed(folders):
        for name in TRACES:
            if (folder / name).is_file():
                return folder / name
    raise BadConfig(
        "no trace is at hand",
        hint="give one with --trace FILE, or set PENSTOCK_DATA to the folder of the published data",
    )
