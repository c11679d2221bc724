"""`penstock chat`: talk to a served model in the terminal, or pipe one prompt through it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from penstock.lab.talk import Talk

app = typer.Typer()
DEFAULT_URL = "http://127.0.0.1:8000"
COMMANDS = "/help /clear /system TEXT /quit"
EPILOG = (
    "Examples: `penstock chat`; `penstock chat http://host:8000`; `penstock chat my-model`; "
    '`echo "def add(a, b):" | penstock chat --complete --max-tokens 40`'
)


@app.command(epilog=EPILOG)
def chat(
    target: Annotated[
        str | None, typer.Argument(help=f"A server's URL, or a model served at {DEFAULT_URL}.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for [the first listed].")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key to send.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    is_complete: Annotated[
        bool, typer.Option("--complete", help="Go on with the text as it is; no chat.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, tokens.")] = None,
) -> None:
    """Talk to a served model.

    Ctrl-C stops an answer, /quit or Ctrl-D ends. When input is piped it is one prompt, and the answer goes to stdout.
    """
    from penstock.lab.talk import Talk

    is_url = target is not None and ("://" in target or ":" in target)
    with Talk(
        target if is_url and target is not None else DEFAULT_URL,
        model=model if is_url or model is not None else target,
        api_key=api_key,
        system=system,
        is_complete=is_complete,
        max_tokens=max_tokens,
    ) as talk:
        if sys.stdin.isatty():
            _converse(talk)
        else:
            _answer_once(talk)


def _answer_once(talk: Talk) -> None:
    from penstock.core.errors import BadRequest

    prompt = sys.stdin.read()
    text = prompt if talk.is_complete else prompt.strip()
    if not text:
        raise BadRequest("nothing was piped in", hint='echo "hello" | penstock chat')
    if not _show(talk, text):
        raise KeyboardInterrupt
    typer.echo()


def _converse(talk: Talk) -> None:
    typer.echo(f"{talk.model} at {talk.url}. {COMMANDS}; Ctrl-C stops an answer.", err=True)
    while True:
        try:
            line = input("> ")
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo()
            continue
        if line.startswith("/"):
            if _obey(talk, line):
                return
        elif line.strip():
            _ask(talk, line)


def _obey(talk: Talk, line: str) -> bool:
    """Follow a command; True to end."""
    word, _, rest = line.partition(" ")
    if word in ("/quit", "/exit"):
        return True
    if word == "/clear":
        talk.clear()
    elif word == "/system":
        talk.system = rest.strip() or None
        talk.clear()
    else:
        typer.echo(f"{COMMANDS}. A line without a slash is said to the model.", err=True)
    return False


def _ask(talk: Talk, line: str) -> None:
    from penstock.core.errors import PenstockError

    try:
        if not _show(talk, line):
            typer.echo(" [stopped]", nl=False)
        typer.echo()
    except PenstockError as error:
        typer.echo(f"[{error}]", err=True)


def _show(talk: Talk, text: str) -> bool:
    """Print an answer as it comes; False when Ctrl-C stopped it."""

    def on_text(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    return talk.say(text, on_text)
