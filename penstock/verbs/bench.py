"""`penstock bench URL --trace FILE`: what does this server do under that traffic? And the other commands of bench."""

from __future__ import annotations

import asyncio
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.core.errors import missing_extra
from penstock.verbs import (
    agreement,
    calibrate,
    engine,
    fail_loudly,
    faults,
    gate,
    quality,
    validate,
)

if TYPE_CHECKING:
    from penstock.lab.bench import Bench, Benched
    from penstock.lab.drive import Driven

EPILOG = (
    "Examples: `penstock bench http://127.0.0.1:8000 --trace data/azure_2023_conv_200.csv --limit 50`; "
    "`penstock bench URL --trace conv.csv --speed 2 --slo-ttft 0.5 --slo-tpot 0.05 --out report.json`; "
    "`penstock bench calibrate`"
)
TICKS_A_LINE = 40  # where no bar can be shown: a line every ten seconds
LIVE = 200  # answers of a class whose median is shown while it runs
DEFAULT_COMMAND = "url"  # `penstock bench URL` is `penstock bench url URL`; see penstock.__main__

# Flags too long for the list of them below.
TraceFile = Annotated[
    Path, typer.Option(help="Traffic: a trace, a CSV of your own, or a workload (.toml).")
]
ColumnsFlag = Annotated[
    str | None, typer.Option(help="Of a CSV of your own: arrival=ts,prompt=in,output=out.")
]
Rate = Annotated[
    float | None,
    typer.Option(help="Poisson arrivals, requests a second, in place of the trace's times."),
]
Promises = Annotated[
    list[str] | None,
    typer.Option(help="For some tenants, e.g. '*/api:ttft=2,tpot=0.1,priority=1'."),
]
Cap = Annotated[int | None, typer.Option(help="At most so many under way (no longer open loop).")]
TokenizerFolder = Annotated[
    Path | None,
    typer.Option(help="Folder whose tokenizer.json sizes prompts [ask the server]."),
]
Key = Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key to send.")]

app = typer.Typer(
    help="Measure a server under a trace, calibrate this machine, or validate the simulator on it."
)
app.command("calibrate", epilog=calibrate.EPILOG)(calibrate.calibrate)
app.command("validate", epilog=validate.EPILOG)(validate.validate)
app.command("agreement", epilog=agreement.EPILOG, no_args_is_help=True)(agreement.agreement)
app.command("engine", epilog=engine.EPILOG)(engine.engine)
app.command("quality", epilog=quality.EPILOG, no_args_is_help=True)(quality.quality)
app.command("faults", epilog=faults.EPILOG)(faults.faults)
app.command("gate", epilog=gate.EPILOG, no_args_is_help=True)(gate.gate)


@app.command("url", epilog=EPILOG, no_args_is_help=True)
def bench_url(  # noqa: PLR0913 - a flag is an argument
    url: Annotated[str, typer.Argument(help="An OpenAI-compatible server.")],
    trace: TraceFile,
    format: Annotated[str | None, typer.Option(help="Format of the trace [recognised].")] = None,
    columns: ColumnsFlag = None,
    limit: Annotated[int | None, typer.Option(help="Play only so many requests.")] = None,
    speed: Annotated[float, typer.Option(help="Play the trace so many times as fast.")] = 1.0,
    rate: Rate = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for [the first listed].")] = None,
    api_key: Key = None,
    is_chat: Annotated[bool, typer.Option("--chat", help="Use chat completions.")] = False,
    slo_ttft: Annotated[float | None, typer.Option(help="Promised time to first token, s.")] = None,
    slo_tpot: Annotated[
        float | None, typer.Option(help="Promised time per later token, s.")
    ] = None,
    promise: Promises = None,
    concurrency_cap: Cap = None,
    timeout: Annotated[float, typer.Option(help="Give up on a request after so long, s.")] = 600.0,
    tokenizer: TokenizerFolder = None,
    seed: Annotated[int, typer.Option(help="Of the prompts' words and Poisson arrivals.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the report here as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here (PNG).")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure an OpenAI-compatible server under a trace (open loop).

    Requests go out at their traced instants, with prompts and answers of the traced lengths. Ctrl-C stops and reports.
    """
    from penstock.lab.bench import Bench
    from penstock.traffic import parse_columns
    from penstock.traffic.promises import parse_promise, slo_of

    if plot is not None and find_spec("matplotlib") is None:  # not after the run
        raise missing_extra("matplotlib", "plot")
    wanted = Bench(
        url=url,
        trace=trace,
        format=format,
        columns=None if columns is None else parse_columns(columns),
        limit=limit,
        speed=speed,
        rate_per_s=rate,
        model=model,
        api_key=api_key,
        is_chat=is_chat,
        slo=slo_of(ttft_s=slo_ttft, tpot_s=slo_tpot),
        promises=tuple(parse_promise(each) for each in promise or ()),
        concurrency_cap=concurrency_cap,
        timeout_s=timeout,
        tokenizer=tokenizer,
        seed=seed,
    )
    _report(_watch(wanted), out, plot, is_json)


def _watch(wanted: Bench) -> Benched:
    """Run the bench with live figures on stderr."""
    import uvloop

    from penstock.lab.bench import bench
    from penstock.report.progress import Bar

    typer.echo(f"penstock bench: {wanted.url} under {wanted.trace}", err=True)
    with Bar("answered", line_every=TICKS_A_LINE) as bar:

        def on_tick(driven: Driven, num_total: int | None) -> None:
            bar.show(driven.num_ended, num_total, progress_line(driven))

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(bench(wanted, on_tick))


def progress_line(driven: Driven) -> str:
    """What a watcher wants to know while it runs: medians are those of the last answers."""
    from penstock.report.summary import spread_of
    from penstock.report.table import seconds

    groups = list(driven.groups.values())
    ttft = spread_of([value for group in groups for value in group.ttft_s[-LIVE:]])
    tpot = spread_of([value for group in groups for value in group.tpot_s[-LIVE:]])
    told = f"{len(driven.open)} running  TTFT p50 {seconds(ttft.p50)}  TPOT p50 {seconds(tpot.p50)}"
    failed = sum(driven.errors.values())
    return f"{told}  {failed} failed" if failed else told


def _report(found: Benched, out: Path | None, plot: Path | None, is_json: bool) -> None:
    from penstock.core.errors import BadConfig
    from penstock.report.card import short
    from penstock.report.table import print_figures

    text = json.dumps(found.to_dict(), indent=None if is_json else 2)
    if is_json:
        typer.echo(text)
    else:
        print_figures(found.figures, f"{found.model} at {found.url}")
        for kind, figures in found.workflows.items():
            typer.echo(f"{kind}s  {figures}")
        typer.echo(f"trace {found.trace}")
        typer.echo(f"card  {short(found.card)}")
    if out is not None:
        try:
            out.write_text(text + "\n")
        except OSError as error:
            raise BadConfig(f"cannot write {out}: {error.strerror}") from None
    if plot is not None:
        from penstock.report.plot import plot as draw

        bounds_s = (found.slo.ttft_s, found.slo.tpot_s)
        groups = found.driven.groups.values()
        draw(
            plot,
            ttft_s=[value for group in groups for value in group.ttft_s],
            tpot_s=[value for group in groups for value in group.tpot_s],
            bins=found.driven.timeline.bins(),
            title=f"{found.model} at {found.url}",
            bounds_s=bounds_s,
        )
    if not found.figures.all.num_finished:
        fail_loudly("bench", found.figures.errors, found.driven.messages)
