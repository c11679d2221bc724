"""`penstock version`: which Penstock, Python and optional packages are at hand."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Annotated

import typer

import penstock
from penstock.core.compiled import is_active

app = typer.Typer()
NAMED = ("torch", "numpy", "safetensors", "starlette", "ray")


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@app.command()
def version(
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the version of Penstock, Python and the packages that matter to it, and whether modules are compiled.

    Example: `penstock version --json`
    """
    found: dict[str, str | None] = {
        "penstock": penstock.__version__,
        "python": platform.python_version(),
        "compiled": "yes" if is_active() else "no, see penstock compile --help",
    }
    found |= {package: _installed(package) for package in NAMED}
    if is_json:
        typer.echo(json.dumps(found))
        return
    for name, value in found.items():
        typer.echo(f"{name:12} {value or 'not installed'}")
