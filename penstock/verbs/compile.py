"""`penstock compile`: the modules that a simulation spends its time in, as C."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def compile(  # noqa: A001 - the verb's name
    is_removing: Annotated[
        bool, typer.Option("--remove", help="Remove what was compiled, of all versions.")
    ] = False,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile what simulations spend their time in, once for this version and this Python.

    Needs the extra `fast` (mypyc) and a C compiler, and takes a few minutes. Results stay the same to the byte. Used by
    itself from then on; `--remove` ends that, and so does every change of the sources. PENSTOCK_COMPILED=off turns it
    off for a run.

    Example: `pip install 'penstock[fast]' && penstock compile`
    """
    from penstock.core.compiled import MODULES, root
    from penstock.lab.compiling import compile_modules, remove_all
    from penstock.report.progress import Bar

    if is_removing:
        remove_all()
        typer.echo(json.dumps({"removed": root()}) if is_json else f"{root()} is removed")
        return
    with Bar(f"compiling {len(MODULES)} modules"):
        place = compile_modules()
    if is_json:
        typer.echo(json.dumps({"folder": str(place), "modules": list(MODULES)}))
    else:
        typer.echo(f"{len(MODULES)} modules are compiled, in {place}")
