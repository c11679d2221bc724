"""`penstock bench quality MODEL`: what fewer bits cost, as perplexity of a text the model has not learned from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.core.errors import missing_extra
from penstock.verbs.engine import chosen

if TYPE_CHECKING:
    from penstock.lab.speed.perplexity import Quality

EPILOG = (
    "Examples: `penstock bench quality default --weights bf16,int8,int4`; "
    "`penstock bench quality ./Qwen3-0.6B --text held_out.txt --weights bf16,int4 --kv auto,int8 --json`"
)
KVS = ("auto", "int8")


def quality(  # noqa: PLR0913 - one flag each
    model: Annotated[str, typer.Argument(help='Folder of a model, or "default".')],
    weights: Annotated[
        str, typer.Option(help="Of bf16, int8 and int4; the first is what others are held to.")
    ] = "bf16,int8,int4",
    kv: Annotated[str, typer.Option(help="Of keys and values: auto, int8, or both.")] = "auto",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text [what the default model has not learned from]."),
    ] = None,
    context: Annotated[int, typer.Option(min=16, help="Tokens of a window.")] = 1024,
    tokens: Annotated[int, typer.Option(min=2, help="Of the text at most.")] = 50_000,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Serve a text's windows with every width and compare perplexities, read off the engine's own log-probabilities.

    The goals: int8 within 1 % of bf16, int4 within 3 %.
    """
    if find_spec("torch") is None:
        raise missing_extra("torch", "engine")
    from penstock.lab.speed.perplexity import documents_of, measure
    from penstock.lab.speed.turns import WEIGHTS
    from penstock.report.progress import Bar

    widths, kvs = chosen("--weights", weights, WEIGHTS), chosen("--kv", kv, KVS)
    settings = [(width, each) for each in kvs for width in widths]
    with Bar("bench quality", line_every=50) as bar:
        found = measure(
            model,
            documents_of(model, text or ()),
            settings,
            context=context,
            limit=tokens,
            on_progress=bar.show,
        )
    typer.echo(json.dumps([asdict(one) for one in found]) if is_json else _table(found))


def _table(found: Sequence[Quality]) -> str:
    lines = [f"{found[0].num_tokens:,} tokens; more: perplexity over that of the first line"]
    lines.append(f"{'weights':>8}{'kv':>6}{'perplexity':>12}{'bits/byte':>11}{'more':>9}")
    for one in found:
        goal = "" if one.is_met is None else "  goal met" if one.is_met else "  GOAL MISSED"
        lines.append(
            f"{one.weights:>8}{one.kv:>6}{one.perplexity:>12.4f}{one.bits_per_byte:>11.4f}{one.more:>+9.2%}{goal}"
        )
    return "\n".join(lines)
