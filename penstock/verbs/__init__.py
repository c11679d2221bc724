"""What people type: `penstock VERB`. A verb reads flags and makes one call to `lab`, `assemble` or `learn`.

Refuses: logic. A verb parses, calls, prints; whatever else it does belongs in the room it calls.

One file a verb. The file offers `app`, a `typer.Typer`: with one command (`@app.command()`, the verb itself) or with
several (`penstock train default`). The table in `penstock.__main__` names it and gives its one line of help, and the
file is imported only when its verb is typed, so keep heavy imports inside the function that needs them. Verbs raise
PenstockError for what the user can mend; `__main__` prints it with its hint and exits with 2. They print with
`typer.echo` or rich: people's text to stdout, progress and warnings to stderr, and with `--json` nothing but JSON to
stdout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import typer

from penstock.core.errors import BadConfig


def refuse(flags: Mapping[str, object], why: str, hint: str) -> None:
    """Raise BadConfig when one of these flags was given."""
    given = [name for name, value in flags.items() if value is not None and value is not False]
    if given:
        raise BadConfig(f"{given[0]} {why}", hint=hint)


def fail_loudly(verb: str, errors: Mapping[str, int], messages: Mapping[str, str]) -> NoReturn:
    """Say that nothing was served and why, a line each kind of error, and end with 1."""
    typer.echo(f"penstock {verb}: NOTHING WAS SERVED", err=True)
    for kind, count in sorted(errors.items(), key=lambda item: -item[1]):
        typer.echo(f"  {count:,} {kind}: {messages.get(kind, 'no message')}", err=True)
    raise typer.Exit(1)
