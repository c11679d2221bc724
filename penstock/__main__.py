"""`penstock VERB ...`: finds the verb, imports it alone, and turns errors into one line and a hint.

`penstock --help` shows the table below and imports no verb, so it needs neither torch nor a web framework. Errors a
user can mend (PenstockError) end with exit code 2 and no traceback; `--debug` anywhere on the line shows it. An
interrupt ends with 130, a closed pipe quietly.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence

import typer

from penstock.core.errors import PenstockError, missing_extra

VERBS: dict[str, str] = {
    "serve": "Serve models over an OpenAI-compatible HTTP API.",
    "top": "Watch the replicas of a running server.",
    "chat": "Talk to a served model in the terminal.",
    "simulate": "Run a deployment on a trace in virtual time.",
    "plan": "Search placements of phases, who encodes images, pipelines of nano-batches.",
    "bench": "Measure a server under a trace, calibrate this machine, validate the simulator on it.",
    "reproduce": "Measure a published claim against its baselines.",
    "trace": "Look at a trace, generate one, or fit a generator to one.",
    "report": "Show what a run did, and why slow requests were slow.",
    "replay": "Take a log's decisions again and compare each one.",
    "train": "Train the default model.",
    "compile": "Compile what simulations spend their time in.",
    "version": "Print the version.",
}
EXTRA_OF = {
    "torch": "engine",
    "safetensors": "engine",
    "huggingface_hub": "engine",
    "matplotlib": "plot",
    "tqdm": "train",
    "ray": "cluster",
    "plotly": "lab",
    "pyarrow": "lab",
    "scipy": "lab",
    "opentelemetry": "otel",
    "aiconfigurator_core": "tables",
}
EPILOG = "`penstock VERB --help` tells more and gives examples. `--debug` shows where an error came from."


def _stub() -> None:
    """Stands for a verb that was not typed, so that the table of verbs can be shown without it."""


def _verb_named(args: Sequence[str]) -> str | None:
    return next((arg for arg in args if not arg.startswith("-")), None)


def _with_default(args: list[str], verb: str | None) -> list[str]:
    """A verb with several commands may name the one that is meant when none is typed (DEFAULT_COMMAND)."""
    if verb not in VERBS:
        return args
    module = importlib.import_module(f"penstock.verbs.{verb}")
    default: str | None = getattr(module, "DEFAULT_COMMAND", None)
    place = args.index(verb) + 1
    names = {command.name for command in module.app.registered_commands}
    if default is None or (place < len(args) and args[place] in names):
        return args
    return [*args[:place], default, *args[place:]]


def build_app(verb: str | None) -> typer.Typer:
    """The command line with `verb` imported and all others as a name and a line of help."""
    app = typer.Typer(
        name="penstock",
        help="Serve AI models within their latency promises; simulate and plan with the same code.",
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, told in VERBS.items():
        if name != verb:
            app.command(name, help=told)(_stub)
            continue
        found = importlib.import_module(f"penstock.verbs.{name}").app
        commands = found.registered_commands
        if len(commands) == 1 and found.registered_callback is None:
            command = commands[0]
            app.command(
                name,
                help=command.help,
                epilog=command.epilog,
                short_help=told,
                no_args_is_help=command.no_args_is_help,
                context_settings=command.context_settings,
            )(command.callback)
        else:
            app.add_typer(found, name=name)
    return app


def _fail(message: str) -> int:
    sys.stderr.write(f"penstock: {message}\n")
    return 2


def run(args: Sequence[str]) -> int:
    """Run one command line; the exit code."""
    is_debug = "--debug" in args
    given = [arg for arg in args if arg != "--debug"]
    given = ["version"] if given == ["--version"] else given
    verb = _verb_named(given)
    try:
        build_app(verb)(args=_with_default(given, verb), prog_name="penstock")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except PenstockError as error:
        if is_debug:
            raise
        return _fail(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if is_debug or package not in EXTRA_OF:
            raise
        extra = "train" if verb == "train" else EXTRA_OF[package]
        return _fail(str(missing_extra(package, extra)))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away: nothing is left to say, nor at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def main() -> None:
    code = run(sys.argv[1:])
    gc.freeze()  # or the interpreter looks through all that there is for garbage before it ends
    sys.exit(code)


if __name__ == "__main__":
    main()
