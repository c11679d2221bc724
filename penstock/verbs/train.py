"""`penstock train default`: the model that comes along, from scratch. `penstock train diffusion`: a tiny LLaDA."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from penstock.core.errors import missing_extra

PACKAGES = ("torch", "safetensors", "tqdm")
app = typer.Typer(help="Train models.")


@app.callback()
def train() -> None:
    """Train models."""


@app.command(
    epilog="Examples: `penstock train default --minutes 45`; `penstock train default --minutes 2 --no-card`"
)
def default(
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("default-model"),
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 45.0,
    is_resume: Annotated[
        bool,
        typer.Option("--resume/--fresh", help="Go on with a run found in --runs, or start anew."),
    ] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    runs: Annotated[Path, typer.Option(help="Folder for checkpoints and the loss log.")] = Path(
        "runs/default"
    ),
    is_card: Annotated[
        bool, typer.Option("--card/--no-card", help="Measure the model and write its card.")
    ] = True,
) -> None:
    """Train the default model from the Python standard library on this machine.

    Checkpoints are written on the way; a run that was stopped goes on where it was. Needs the extra `train`.
    """
    _require(*PACKAGES, *(("matplotlib",) if is_card else ()))
    from penstock.learn.local.default import train_default

    folder = train_default(
        out, minutes=minutes, resume=is_resume, device=device, runs=runs, card=is_card
    )
    typer.echo(f"the model is in {folder}: penstock serve {folder}")


@app.command(
    epilog="Examples: `penstock train diffusion`; `penstock train diffusion --out my-canvas --steps 2000 --seed 1`"
)
def diffusion(
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("tiny-diffusion"),
    steps: Annotated[
        int, typer.Option(min=1, help="Of 4096 tokens; 1000 take 9 minutes of one core.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Same seed, same Python: same model.")] = 0,
    runs: Annotated[Path, typer.Option(help="Folder for the tokenised text.")] = Path(
        "runs/diffusion"
    ),
) -> None:
    """Train a tiny masked diffusion model that opens as LLaDA, from the standard library and made-up pages.

    It is what the tests and `penstock bench agreement` are tried on. Needs the extra `train`.
    """
    _require(*PACKAGES)
    from penstock.learn.local.diffusion import train_diffusion

    folder = train_diffusion(out, steps=steps, seed=seed, runs=runs)
    typer.echo(f"the model is in {folder}: penstock serve {folder} --policy dllm-serve")


def _require(*packages: str) -> None:
    """Fail before hours of training, not after. Raises MissingExtra."""
    for package in packages:
        if find_spec(package) is None:
            raise missing_extra(package, "train")
