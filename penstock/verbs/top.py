"""`penstock top`: what the replicas of a running server are doing, live in the terminal."""

from __future__ import annotations

import json
import sys
import threading
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.core.errors import BadConfig, PenstockError, UpstreamFailed

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer()
DEFAULT_URL = "http://127.0.0.1:8000"
PATH = "/internal/state"
TIMEOUT_S = 10.0
EPILOG = (
    "Examples: `penstock top`; `penstock top http://host:8000 --every 5`; `penstock top --once`; "
    "`penstock top --json | jq '.replicas[].num_waiting'`"
)


@app.command(epilog=EPILOG)
def top(
    url: Annotated[str, typer.Argument(help="A server's URL.")] = DEFAULT_URL,
    every: Annotated[float, typer.Option(help="Seconds between two looks.")] = 1.0,
    is_once: Annotated[bool, typer.Option("--once", help="Show one frame and end.")] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="PENSTOCK_API_KEY", help="Key to send.")
    ] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print one snapshot as JSON.")] = False,
) -> None:
    """Show replicas, queues, memory, rates and movements of a running server. Ctrl-C ends."""
    if not every > 0:
        raise BadConfig(f"--every wants a positive number of seconds, got {every:g}")
    base = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    if is_json:
        typer.echo(json.dumps(_ask(base, api_key)))
        return
    from rich.console import Console

    console = Console()
    if is_once or not sys.stdout.isatty():
        _show_once(console, base, every, api_key)
    else:
        _watch(console, base, every, api_key)


def _show_once(console: Console, url: str, every: float, key: str | None) -> None:
    """One frame, of two looks so that it has rates."""
    from penstock.report.top import frame

    before = _ask(url, key)
    threading.Event().wait(min(every, 1.0))
    console.print(frame(_ask(url, key), before, url=url))


def _watch(console: Console, url: str, every: float, key: str | None) -> None:
    from rich.live import Live
    from rich.text import Text

    from penstock.report.top import frame

    before = _ask(url, key)
    pause = threading.Event()
    with Live(frame(before, url=url), console=console, screen=True, auto_refresh=False) as live:
        try:
            while not pause.wait(every):
                try:
                    snapshot = _ask(url, key)
                except PenstockError as error:  # it may come back
                    live.update(Text(f"{error.message}; asking again", style="red"), refresh=True)
                    continue
                live.update(frame(snapshot, before, url=url), refresh=True)
                before = snapshot
        except KeyboardInterrupt:
            return


def _ask(url: str, key: str | None) -> dict[str, Any]:
    """Raises UpstreamFailed."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        asked = urllib.request.Request(url + PATH, headers=headers)
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
            told: dict[str, Any] = json.load(answer)
            return told
    except urllib.error.HTTPError as error:
        hint = "it is no Penstock server, or an older one"
        if error.code == 401:
            hint = "pass its key with --api-key"
        raise UpstreamFailed(f"{url} answers {error.code} to {PATH}", hint=hint) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UpstreamFailed(
            f"cannot reach {url}: {reason}", hint="start one with `penstock serve`"
        ) from None
