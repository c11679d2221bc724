"""`penstock bench agreement MODEL`: how the text of a diffusion language model changes with what it keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from penstock.core.errors import BadConfig, missing_extra

EPILOG = (
    "Examples: `penstock bench agreement data/tiny_diffusion`; "
    "`penstock bench agreement ./LLaDA-8B --prompts mine.jsonl --retention 0.5 --refresh-every 8 --device cuda`; "
    "`penstock bench agreement ./LLaDA-8B --prompts mine.jsonl --json`"
)


DTYPES: dict[str, Literal["auto", "fp32", "bf16"]] = {
    "auto": "auto",
    "fp32": "fp32",
    "bf16": "bf16",
}
N = TypeVar("N", int, float)


def agreement(  # noqa: PLR0913 - one flag each
    model: Annotated[str, typer.Argument(help="Folder of a diffusion language model.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help='Lines of {"prompt", "answer", "kind"} [held_out.jsonl of the folder].'),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of every answer.")] = 64,
    retention: Annotated[
        str, typer.Option(help="Shares of positions kept, refreshed once a block.")
    ] = "1,0.75,0.5,0.25",
    refresh_every: Annotated[
        str, typer.Option(help="Steps between refreshes; 1 computes everything every step.")
    ] = "8,4,1",
    threshold: Annotated[
        str, typer.Option(help="Confidences above which a step reveals every token at once.")
    ] = "",
    steps: Annotated[int, typer.Option(help="Steps of a block of 32 tokens.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Serve the same prompts with every setting and compare the texts with those of the exact run.

    The exact run computes all positions in every step. One that refreshes in every step must say the same.
    """
    if find_spec("torch") is None:
        raise missing_extra("torch", "engine")
    from penstock.core.types import CanvasRule
    from penstock.engine.torch.build import EngineConfig
    from penstock.lab.agreement import agreement as measure
    from penstock.lab.agreement import settings, text_of
    from penstock.report.progress import Bar

    if dtype not in DTYPES:
        raise BadConfig(f"there is no dtype {dtype}", hint=f"use {', '.join(DTYPES)}")
    try:
        rules = settings(
            CanvasRule(steps=steps),
            _numbers(retention, float),
            _numbers(refresh_every, int),
            _numbers(threshold, float),
        )
    except ValueError as error:
        raise BadConfig(
            f"--retention, --refresh-every, --threshold or --steps: {error}",
            hint="for example --retention 1,0.5 --refresh-every 8,1",
        ) from None
    with Bar("agreement", line_every=1) as bar:
        found = measure(
            model,
            prompts=prompts,
            rules=rules,
            num_masks=max_tokens,
            config=EngineConfig(device=device, dtype=DTYPES[dtype]),
            on_done=bar.show,
        )
    typer.echo(json.dumps([asdict(one) for one in found]) if is_json else text_of(found))


def _numbers(told: str, kind: Callable[[str], N]) -> list[N]:
    return [kind(each) for each in told.split(",") if each.strip()]
