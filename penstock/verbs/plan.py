"""`penstock plan pipeline CONFIG`: how a step is cut into nano-batches that overlap."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.core.errors import BadConfig, missing_extra

if TYPE_CHECKING:
    from penstock.lab.nano_offline import Lengths

EPILOG = (
    "Examples: `penstock plan pipeline examples/nanoflow_70b.toml --lengths 512/512`; "
    "`penstock plan pipeline deploy.toml --trace conv.csv --out conv.json --plot conv.png`; then "
    "`penstock simulate deploy.toml --trace conv.csv --set 'fleet.0.executor.templates=[\"conv.json\"]'`. "
    "Searches are kept in ~/.cache/penstock/nano and made once. Nothing here runs on the hardware it names."
)
app = typer.Typer(help="Search what is made ahead of a deployment: pipelines of nano-batches.")


@app.callback()
def plan() -> None:
    """Search what is made ahead of a deployment: pipelines of nano-batches."""


@app.command("pipeline", epilog=EPILOG, no_args_is_help=True)
def pipeline(  # noqa: PLR0913 - a flag is an argument
    config: Annotated[Path, typer.Argument(help="TOML file of the deployment; its first fleet.")],
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of all prompts and answers, say 512/512.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Take the lengths of this traffic.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Of the dense batch [what memory keeps full, at most 2048].")
    ] = None,
    sharing: Annotated[
        str, typer.Option(help="Interference: paper, pessimistic, time-slicing or none.")
    ] = "paper",
    is_quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes, in seconds.")] = False,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, e.g. fleet.0.executor.gpu=h100.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Write the template here.")] = Path("pipeline.json"),
    plot: Annotated[Path | None, typer.Option(help="Write a picture here (PNG).")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find how a layer is cut into nano-batches whose compute, memory and network overlap, and write the template.

    Two mixed-integer programs (order without interference, shares with it) for each shape of a cut, and a polish; a
    minute of processor time. Simulated steps are run under the template when `executor.templates` names its file and
    the batch policy asks for it (preset nanoflow).
    """
    from penstock.assemble import load_config
    from penstock.lab.pipeline import plan_pipeline
    from penstock.lab.pipeline_picture import plot as draw
    from penstock.lab.pipeline_picture import text_of
    from penstock.report.files import check_writable, write_text
    from penstock.report.progress import Bar

    if plot is not None and find_spec("matplotlib") is None:  # not after the search
        raise missing_extra("matplotlib", "plot")
    built = load_config(config, sets=sets or ())
    asked = _lengths(lengths, trace)
    check_writable(out, "the template")
    with Bar("searching", line_every=4) as bar:
        found = plan_pipeline(
            built,
            asked,
            tokens=tokens,
            sharing=sharing,
            effort="quick" if is_quick else "full",
            on_progress=bar.show,
        )
    write_text(out, found.template.to_json(), what="the template")
    if plot is not None:
        draw(plot, found)
    if is_json:
        typer.echo(json.dumps({**found.to_dict(), "path": str(out)}))
    else:
        typer.echo(
            f"{text_of(found)}\n\nwrote     {out}; executor.templates = [{json.dumps(str(out))}]"
        )


def _lengths(lengths: str | None, trace: Path | None) -> Lengths:
    """One of the two."""
    if (lengths is None) == (trace is None):
        raise BadConfig(
            "a pipeline is made for requests of some length: give --lengths or --trace, not both",
            hint="for example --lengths 512/512",
        )
    if trace is not None:
        from penstock.lab.pipeline import lengths_of
        from penstock.traffic import open_trace

        return lengths_of(open_trace(trace))
    assert lengths is not None
    prompt, _, output = lengths.partition("/")
    if not (prompt.isdecimal() and output.isdecimal() and int(prompt) and int(output)):
        raise BadConfig(f"--lengths wants PROMPT/ANSWER in tokens, say 512/512; got {lengths!r}")
    return [(int(prompt), int(output))]
