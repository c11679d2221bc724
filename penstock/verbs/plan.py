"""`penstock plan pipeline CONFIG`: how a step is cut; `penstock plan placement MODEL`: where its phases go;
`penstock plan images CONFIG`: who encodes images.
"""

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
PLACE_EPILOG = (
    "Examples: `penstock plan placement llama-3.1-70b --gpu h100 --gpus 8 --lengths 1024/256 --ttft 1 --tpot 0.05`; "
    "`penstock plan placement opt-66b --gpu a100-80g --tables distserve --gpus 8 --nodes 2 --trace conv.csv "
    "--ttft 2.5 --tpot 0.06 --demand 10 --plot search.png`. A pair whose phases are apart is not always the better "
    "one: all ways are searched alike, and the table says what each came to."
)
IMAGES_EPILOG = (
    "Example: `penstock plan images deploy.toml --trace shown.toml --ttft 1 --tpot 0.05`, where the fleet has "
    '`executor = {gpu = "a100-80g", vision = "qwen2-vl"}` and the workload `[images]`. Simulated: real engines take '
    "text alone."
)
app = typer.Typer(
    help="Search placements of phases, who encodes images, pipelines of nano-batches.",
    no_args_is_help=True,
)


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

    _check_plot(plot)
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


@app.command("placement", epilog=PLACE_EPILOG, no_args_is_help=True)
def placement(  # noqa: PLR0913 - a flag is an argument
    model: Annotated[str, typer.Argument(help="A known shape (opt-66b) or a model folder.")],
    gpu: Annotated[str, typer.Option(help="Card of the catalogue, say h100.")],
    ttft: Annotated[float, typer.Option(help="Promise: seconds to the first token.")],
    tpot: Annotated[float, typer.Option(help="Promise: seconds for each further token.")],
    gpus: Annotated[int, typer.Option(min=1, help="Cards of one node.")] = 8,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    has_fast_links: Annotated[
        bool, typer.Option("--fast-links", help="KV may move between nodes.")
    ] = False,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of all prompts and answers, say 512/512.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Draw the lengths of this traffic.")] = None,
    demand: Annotated[
        float | None, typer.Option(help="Requests a second to be served [one unit].")
    ] = None,
    tables: Annotated[
        str | None,
        typer.Option(help="Step times: aiconfigurator, distserve, distserve-vllm [the roofline]."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here (PNG).")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find how prefill and decode are placed for the most goodput a device: apart, together, or in chunks.

    Every valid degree of tensor and pipeline parallelism is tried; for each, the highest Poisson rate is found at
    which the P90 of TTFT and of TPOT keep their promises. Queues of two phases judge, no scheduler and no blocks.
    """
    from penstock.lab.placement import (
        Asked,
        Judge,
        hardware,
        placement_link,
        plan_placement,
        spec_of,
    )
    from penstock.lab.placement_picture import plot as draw
    from penstock.lab.placement_picture import table_of, text_of
    from penstock.policy.place import Site
    from penstock.report.progress import Bar
    from penstock.traffic.lengths import Empirical

    _check_plot(plot)
    site = Site(nodes=nodes, devices_per_node=gpus, has_fast_links=has_fast_links)
    drawn = Empirical.of(_lengths(lengths, trace))
    with Bar("searching", line_every=50) as bar:
        judge = Judge(
            hardware=hardware(model, spec_of(gpu, tables)),
            asked=Asked(lengths=drawn, ttft_s=ttft, tpot_s=tpot),
            transfer=placement_link(site),
            on_try=lambda unit, tries: bar.show(tries, None, unit),
        )
        placed = plan_placement(judge, site, demand_per_s=demand)
    if plot is not None:
        draw(plot, placed)
    typer.echo(json.dumps(table_of(placed)) if is_json else text_of(placed))


@app.command("images", epilog=IMAGES_EPILOG, no_args_is_help=True)
def images(  # noqa: PLR0913 - a flag is an argument
    config: Annotated[Path, typer.Argument(help="TOML file of the deployment; its first fleet.")],
    trace: Annotated[Path, typer.Option(help="Traffic with images.")],
    ttft: Annotated[float, typer.Option(help="Promise: seconds to the first token.")],
    tpot: Annotated[float, typer.Option(help="Promise: seconds for each further token.")],
    requests: Annotated[int, typer.Option(min=1, help="Requests of each trial.")] = 400,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, e.g. fleet.0.replicas=8.")
    ] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find how much of images and prompts a step may have, and which replicas encode, prefill and write.

    All ways are simulated on the traffic: all replicas doing everything, EP-D, ED-P and E-P-D, their numbers in
    proportion to what the stages take. The best is the one with the highest rate at which 90 % keep both promises.
    """
    from penstock.assemble import load_config
    from penstock.lab.encode_plan import AskedFor, plan_images, table_of, text_of
    from penstock.report.progress import Bar

    if not (ttft > 0 and tpot > 0):
        raise BadConfig("--ttft and --tpot must be positive seconds")
    asked = AskedFor(trace=trace, ttft_s=ttft, tpot_s=tpot, num=requests)
    with Bar("searching", line_every=10) as bar:
        found = plan_images(
            load_config(config, sets=sets or ()),
            asked,
            on_try=lambda name, tries: bar.show(tries, None, name),
        )
    typer.echo(json.dumps(table_of(found)) if is_json else text_of(found))


def _check_plot(path: Path | None) -> None:
    """Before the search, not after it."""
    if path is None:
        return
    if find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "plot")
    from penstock.report.files import check_writable

    check_writable(path, "the picture")


def _lengths(lengths: str | None, trace: Path | None) -> Lengths:
    """One of the two."""
    if (lengths is None) == (trace is None):
        raise BadConfig(
            "a plan is made for requests of some length: give --lengths or --trace, not both",
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
