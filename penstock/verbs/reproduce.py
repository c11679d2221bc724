"""`penstock reproduce NAME`: a published claim, measured against its baselines."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.core.errors import BadConfig, missing_extra

if TYPE_CHECKING:
    from penstock.lab.points import Result
    from penstock.lab.reproduce import Kept

EPILOG = (
    "Examples: `penstock reproduce --list`; `penstock reproduce vllm-chunk --quick`; "
    "`penstock reproduce burstgpt --full --data traces/ --plot burstgpt.png`. "
    "A run that was stopped goes on where it was. Nothing here runs on the hardware it names: step times are modelled."
)
app = typer.Typer()
QUICK_SEEDS, FULL_SEEDS = 2, 5


@app.command(epilog=EPILOG, no_args_is_help=True)
def reproduce(  # noqa: PLR0913 - a flag is an argument
    name: Annotated[str | None, typer.Argument(help="Which experiment; see --list.")] = None,
    is_list: Annotated[bool, typer.Option("--list", help="List the experiments.")] = False,
    is_full: Annotated[
        bool, typer.Option("--full/--quick", help="All loads and seeds, or a look in a minute.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(help="Seeds a point [2 quick, 5 full, which is the least].")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(envvar="PENSTOCK_DATA", help="Folder of the published traces."),
    ] = None,
    processes: Annotated[int | None, typer.Option(help="At once [one a core].")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
    is_kept: Annotated[
        bool, typer.Option("--keep", help="Keep in docs/results and write docs/systems.md.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here (PNG).")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a published claim against its baselines, in virtual time, and say whether it holds here."""
    from penstock.experiments import find
    from penstock.lab.experiment import Scale
    from penstock.lab.reproduce import picture
    from penstock.lab.reproduce import reproduce as run_experiment
    from penstock.report.files import write_text
    from penstock.report.progress import Bar

    if is_list or name is None:
        _list(is_json)
        return
    experiment = find(name)
    if is_kept and not is_full:
        raise BadConfig("only a full run may be kept", hint="add --full")
    if plot is not None and find_spec("matplotlib") is None:  # not after the runs
        raise missing_extra("matplotlib", "plot")
    if plot is not None and experiment.draw is None:
        raise BadConfig(f"{name} has no picture", hint="leave out --plot")
    usual = FULL_SEEDS if is_full else QUICK_SEEDS
    scale = Scale(
        name="full" if is_full else "quick",
        num_seeds=usual if seeds is None else seeds,
        data=data,
    )
    with Bar(f"reproducing {name}") as bar:

        def on_progress(done: int, total: int, result: Result) -> None:
            bar.show(done, total, str(result.point.settings.get("variant", "")))

        store = out / f"{name}.points.jsonl"
        kept = run_experiment(
            experiment, scale, store=store, processes=processes, on_progress=on_progress
        )
    path = write_text(out / f"{name}.{scale.name}.json", kept.to_json())
    if plot is not None:
        picture(experiment, kept, plot)
    if is_kept:
        _keep(kept)
    typer.echo(kept.to_json() if is_json else _told(kept, path))


def _list(is_json: bool) -> None:
    import json

    from penstock.experiments import TABLE, find

    found = [find(name) for name in TABLE]
    if is_json:
        typer.echo(
            json.dumps(
                [{"name": each.name, "system": each.system, "claim": each.claim} for each in found]
            )
        )
        return
    for each in found:
        typer.echo(f"{each.name:14} {each.system}\n{'':14} {each.claim}")


def _keep(kept: Kept) -> None:
    from penstock.lab.reproduce import keep

    for path in keep(kept):
        typer.echo(f"wrote {path}", err=True)


def _told(kept: Kept, path: Path) -> str:
    lines = [
        f"{kept.system}",
        f"claim      {kept.claim}",
        f"criterion  {kept.criterion}",
        f"workload   {kept.workload}",
        f"runs       {kept.num_runs}, seeds {', '.join(map(str, kept.seeds))}, {kept.cpu_s:,.0f} s of processor time",
        *(f"constant   {what}: {value}" for what, value in kept.constants),
    ]
    if kept.num_unequal:
        lines.append(f"warning    variants served different requests at {kept.num_unequal} points")
    lines += [
        f"ratio      {ratio.name}: {ratio}"
        + (f" (published: {ratio.published})" if ratio.published else "")
        for ratio in kept.verdict.ratios
    ]
    verdict = (
        kept.verdict.outcome
        if kept.scale == "full"
        else f"{kept.verdict.outcome} (QUICK: too few runs for a verdict)"
    )
    return "\n".join([*lines, f"VERDICT    {verdict}: {kept.verdict.why}", f"kept       {path}"])
