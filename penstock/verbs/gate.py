"""`penstock bench gate LOGS`: the simulator beside logged runs of real vLLM. A command of penstock.verbs.bench."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from penstock.core.errors import missing_extra

EPILOG = (
    "Examples: `penstock bench gate vllm_logs --op-tables op_tables`; "
    "`penstock bench gate vllm_logs/RTXPRO6000_Qwen3-32B --op-tables op_tables --json`; "
    "`penstock bench gate vllm_logs --op-tables op_tables --plot gate.png`"
)


def gate(
    logs: Annotated[
        Path, typer.Argument(help="A folder of logged vLLM runs (LLMServingSim's format), or one.")
    ],
    op_tables: Annotated[
        Path, typer.Option(help="Folder of operator tables, one for each card, model and degree.")
    ],
    plot: Annotated[Path | None, typer.Option(help="Write a picture here (PNG).")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Replay logged runs of real vLLM in the simulator, and tell its errors beside other simulators'.

    What an engine adds to its kernels is fitted on the other runs, never on the one that is scored; a run alone is
    scored with nothing fitted. Ends with 1 when a run is beyond the gate.
    """
    from penstock.lab.gate import gate as measure
    from penstock.lab.gate_text import text_of
    from penstock.report.progress import Bar

    if plot is not None and find_spec("matplotlib") is None:  # not after the run
        raise missing_extra("matplotlib", "lab")
    with Bar("gate", line_every=1) as bar:
        found = measure(logs, op_tables, on_done=bar.show)
    typer.echo(json.dumps([one.to_dict() for one in found]) if is_json else text_of(found))
    if plot is not None:
        from penstock.lab.gate_plot import plot as draw

        draw(plot, found)
    if not all(one.scores.is_through for one in found):
        raise typer.Exit(1)
