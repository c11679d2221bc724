"""`penstock replay LOG`: are the decisions of a log the ones these policies take?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()
EPILOG = (
    "Examples: `penstock replay log/replica-0.jsonl`; `penstock replay log/` for a folder; "
    "`penstock replay log/ --json`. Exit code 1: a decision differs."
)


@app.command(epilog=EPILOG)
def replay(
    log: Annotated[Path, typer.Argument(help="A log file, or a folder of them (*.jsonl).")],
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Take the decisions of a log again and compare each one.

    The replicas and fleets of the log are made again, fed its inputs at its instants, and must write the same events.
    No model is loaded and nothing is waited for.
    """
    from penstock.core.types import SCHEMA
    from penstock.lab.replay import Outcome, replay_log
    from penstock.report.log import log_paths
    from penstock.report.progress import Bar

    outcomes: list[Outcome] = []
    for path in log_paths(log):
        with Bar(f"replaying {path.name}") as bar:
            found = replay_log(path, bar.show)
        outcomes += found
        if not is_json:
            for outcome in found:
                _show(outcome)
    if is_json:
        told = [dataclasses.asdict(outcome) for outcome in outcomes]
        typer.echo(json.dumps({"schema": SCHEMA, "outcomes": told}, default=str))
    elif len(outcomes) > 1:
        same = sum(outcome.difference is None for outcome in outcomes)
        total = sum(outcome.num_decisions for outcome in outcomes)
        typer.echo(f"{same} of {len(outcomes)} logs identical, {total:,} decisions")
    if any(outcome.difference is not None for outcome in outcomes):
        raise typer.Exit(1)


def _show(outcome: object) -> None:
    from penstock.lab.replay import Outcome

    assert isinstance(outcome, Outcome)
    for note in outcome.notes:
        typer.echo(f"{outcome.who}: note: {note}", err=True)
    if outcome.difference is None:
        typer.echo(f"{outcome.who}: {outcome.num_decisions:,} decisions, all identical")
    else:
        typer.echo(f"{outcome.difference}\n  after {outcome.num_decisions:,} identical ones")
