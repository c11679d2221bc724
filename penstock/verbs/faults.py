"""`penstock bench faults`: the whole fleet under faults, in virtual time. A command of penstock.verbs.bench."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from penstock.core.errors import BadConfig

EPILOG = (
    "Examples: `penstock bench faults`; `penstock bench faults --seeds 2000 --fault kill --fault cut`; "
    "`penstock bench faults --first 137 --seeds 1 --log run.jsonl`"
)
SHOW_EVERY = 25  # seeds, where no bar can be shown


def faults(
    seeds: Annotated[int, typer.Option(help="How many runs, one a seed.", min=1)] = 200,
    first: Annotated[int, typer.Option(help="The first seed.", min=0)] = 0,
    fault: Annotated[
        list[str] | None, typer.Option(help="Only faults of this kind (may be repeated) [all].")
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(help="Write what happened in the first run that broke, or in the only one."),
    ] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Kill, stall, cut off and confuse a fleet of modelled replicas, and check that nothing is lost or doubled.

    Fleet, router, links and replicas are the code that serves. A seed decides the fleet, its traffic and all that goes
    wrong, and always gives the same run. Ends with 1 when a run broke, and says how to see it again.
    """
    from penstock.lab.fault_text import sums, text_of
    from penstock.lab.faults import Ran, run_seeds, table_of
    from penstock.report.progress import Bar
    from penstock.sim.faults import KINDS

    unknown = sorted(set(fault or ()) - set(KINDS))
    if unknown:
        raise BadConfig(
            f"there is no fault called {', '.join(unknown)}", hint=f"there are {', '.join(KINDS)}"
        )
    kinds = tuple(dict.fromkeys(fault or KINDS))
    done: list[Ran] = []
    with Bar("seeds", line_every=SHOW_EVERY) as bar:

        def show(ran: Ran) -> None:
            done.append(ran)
            bar.show(len(done), seeds, f"{sum(one.broken is not None for one in done)} broken")

        found = run_seeds(
            range(first, first + seeds), kinds, keeps_timeline=log is not None, on_done=show
        )
    broken = [ran for ran in found if ran.broken]
    if log is not None and (broken or len(found) == 1):
        _write(log, (broken or found)[0].timeline)
    if is_json:
        told = {
            "faults": [row.to_dict() for row in table_of(found)],
            "ends": sums(found, "ends"),
            "moves": sums(found, "moves"),
            "broken": [ran.to_dict() for ran in broken],
        }
        typer.echo(json.dumps(told))
    else:
        typer.echo(text_of(found, kinds))
    if broken:
        raise typer.Exit(1)


def _write(path: Path, timeline: Sequence[str]) -> None:
    try:
        path.write_text("".join(f"{line}\n" for line in timeline))
    except OSError as error:
        raise BadConfig(f"cannot write {path}: {error.strerror}") from None
