"""`penstock bench engine`: the engine beside others, in turns."""

from __future__ import annotations

import asyncio
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.core.cache_folder import cache_folder
from penstock.core.errors import BadConfig, missing_extra

if TYPE_CHECKING:
    from penstock.lab.speed.asks import Sizes
    from penstock.lab.speed.turns import Wanted

EPILOG = (
    "Examples: `penstock bench engine`; "
    '`penstock bench engine --only decode,prefill --peer "openvino=VENV/bin/python benchmarks/peers/genai.py"`; '
    "`penstock bench engine --model llama-160m --weights bf16,int8,int4 --threads 1,2 --out speed.json`; "
    "`penstock bench engine --from speed.json --page docs/performance.md`"
)
SCRATCH = cache_folder("speed")

Model = Annotated[
    str,
    typer.Option(help="A folder, or random weights: qwen3-0.6b, llama-160m, llama-25m."),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(help="Another engine, NAME=COMMAND; its lines: benchmarks/peers/README.md."),
]
Only = Annotated[
    str, typer.Option(help="Of decode, prefill, many, prefix and start; commas between.")
]
Threads = Annotated[
    str,
    typer.Option(help="1: work a processor second. More: the wall's 5th percentile."),
]
Scratch = Annotated[
    Path, typer.Option(help="Folder for models, what engines convert, and what they say.")
]
Given = Annotated[
    list[Path] | None, typer.Option("--from", help="Measure nothing: show the JSON of runs.")
]
Page = Annotated[Path | None, typer.Option(help="Write the tables between the marks of this page.")]


def engine(  # noqa: PLR0913 - one flag each
    model: Model = "qwen3-0.6b",
    peer: Peers = None,
    weights: Annotated[str, typer.Option(help="Of bf16, int8 and int4; commas between.")] = "bf16",
    threads: Threads = "1",
    only: Only = "decode,prefill,many,prefix,start",
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each engine.")] = 3,
    context: Annotated[int, typer.Option(min=2, help="Prompt before the decoding.")] = 512,
    steps: Annotated[int, typer.Option(min=16, help="Tokens decoded.")] = 64,
    prefills: Annotated[str, typer.Option(help="More prompts to be timed.")] = "2048",
    requests: Annotated[int, typer.Option(min=2, help="At once, of many and prefix.")] = 32,
    has_port: Annotated[
        bool, typer.Option("--port", help="The executor without its replica, too.")
    ] = False,
    scratch: Scratch = SCRATCH,
    given: Given = None,
    page: Page = None,
    out: Annotated[
        Path | None, typer.Option(help="Write all samples here as JSON, as they come.")
    ] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the engine beside others: one run, the same model, each engine in its own process, in turns.

    Decoding beside what a plain read of memory gets, prompts, many requests at once, shared prefixes, starting.
    """
    from penstock.lab.speed.figures import digest
    from penstock.lab.speed.text import text_of

    if given:
        runs = [_read(path) for path in given]
    else:
        sizes = _sizes(context, steps, prefills, requests)
        runs = [
            _measured(
                _wanted(model, peer, weights=weights, threads=threads, only=only),
                out,
                repeats=repeats,
                sizes=sizes,
                scratch=scratch.expanduser(),
                has_port=has_port,
            )
        ]
    models = dict.fromkeys(str(run["model"]) for run in runs)
    found = [digest([run for run in runs if run["model"] == each]) for each in models]
    if page is not None:
        _place(page, found)
    if is_json:
        typer.echo(json.dumps(runs if len(runs) > 1 else runs[0]))
    else:
        typer.echo("\n\n".join(text_of(each) for each in found))


def _sizes(context: int, steps: int, prefills: str, requests: int) -> Sizes:
    from penstock.lab.speed.asks import Sizes

    try:
        some = tuple(int(each) for each in prefills.split(",") if each.strip())
        if any(each < 2 for each in some):
            raise ValueError("prompts have at least 2 tokens")
    except ValueError as error:
        raise BadConfig(f"--prefills: {error}", hint="for example --prefills 2048,4096") from None
    return Sizes(context=context, steps=steps, prefills=some, requests=requests)


def _wanted(
    model: str, peers: list[str] | None, *, weights: str, threads: str, only: str
) -> dict[str, Any]:
    """Fields of what is wanted, each checked."""
    from penstock.lab.speed.peer import PeerSpec
    from penstock.lab.speed.turns import MEASURES, WEIGHTS

    try:
        specs = tuple(PeerSpec.parse(each) for each in peers or ())
    except ValueError as error:
        raise BadConfig(
            f"--peer {error}", hint="for example --peer 'other=python drive.py'"
        ) from None
    counts = chosen("--threads", threads, None)
    if not all(each.isdigit() and int(each) for each in counts):
        raise BadConfig(
            f"--threads {threads}: numbers are needed", hint="for example --threads 1,2"
        )
    return {
        "model": model,
        "peers": specs,
        "weights": chosen("--weights", weights, WEIGHTS),
        "threads": tuple(map(int, counts)),
        "measures": chosen("--only", only, MEASURES),
    }


def chosen(flag: str, told: str, known: tuple[str, ...] | None) -> tuple[str, ...]:
    """A list with commas, of what is known. Raises BadConfig."""
    found = tuple(dict.fromkeys(each.strip() for each in told.split(",") if each.strip()))
    unknown = [each for each in found if known is not None and each not in known]
    if unknown or not found:
        what = f"there is no {unknown[0]!r}" if unknown else "nothing is named"
        raise BadConfig(f"{flag} {told}: {what}", hint=f"say {', '.join(known or ('1',))}")
    return found


def _measured(fields: dict[str, Any], out: Path | None, **more: Any) -> dict[str, Any]:
    """The run. `out` has all samples so far at any time, so a run that is stopped is not lost."""
    if find_spec("torch") is None:
        raise missing_extra("torch", "engine")
    from penstock.lab.speed.turns import Turns, Wanted
    from penstock.report.files import write_text
    from penstock.report.progress import Bar

    wanted: Wanted = Wanted(**fields, **more)
    with Bar("bench engine", line_every=1) as bar:

        def tell(done: int, of: int, told: str) -> None:
            bar.show(done, of, told)
            if out is not None:
                write_text(out, json.dumps(turns.run.to_dict()) + "\n")

        turns = Turns(wanted, tell)
        run = asyncio.run(turns.all())
    return json.loads(json.dumps(run.to_dict()))  # type: ignore[no-any-return]


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text())
        told["samples"], told["model"]
    except OSError as error:
        raise BadConfig(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise BadConfig(f"{path} is no JSON of `penstock bench engine --out`") from None
    return told  # type: ignore[no-any-return]


def _place(page: Path, found: list[Any]) -> None:
    from penstock.lab.speed.text import page_of, placed
    from penstock.report.files import write_text

    try:
        write_text(page, placed(page.read_text(), page_of(found)))
    except OSError as error:
        raise BadConfig(f"cannot read {page}: {error.strerror}") from None
    except ValueError as error:
        raise BadConfig(str(error)) from None
