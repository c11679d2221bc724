"""`penstock serve [MODEL]`: an OpenAI-compatible server."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from penstock.assemble import load_config, print_config
from penstock.assemble.presets import policy_tables
from penstock.assemble.serving import Ready, run
from penstock.core.errors import BadConfig
from penstock.gateway.vectors import Use

app = typer.Typer(add_completion=False)

# A flag each, in the order of the parameters below.
Model = Annotated[
    str | None,
    typer.Argument(help="A model folder, .gguf file or Hub name; nothing: the bundled model."),
]
Host = Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")]
Port = Annotated[int | None, typer.Option(help="Port; 0 takes any free one [8000].")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")]
Weights = Annotated[str | None, typer.Option(help="stored, or fewer bits: int8, int4.")]
Kv = Annotated[str | None, typer.Option(help="Keys and values in: auto or int8.")]
Policy = Annotated[
    str | None,
    typer.Option(help="Preset of scheduling policies, say vllm-v1; docs/schedulers.md."),
]
Replicas = Annotated[int | None, typer.Option(help="Engines that serve the model [1].")]
Route = Annotated[
    str | None, typer.Option(help="Which replica a request goes to; docs/cluster.md [prefix].")
]
Cluster = Annotated[
    str | None, typer.Option(help="Engines on a Ray cluster: auto, HOST:PORT or ray://HOST:PORT.")
]
LoraModules = Annotated[
    list[str] | None,
    typer.Option(help="LoRA adapter, NAME=FOLDER; callers ask for it as a model of that name."),
]
Remote = Annotated[
    list[str] | None,
    typer.Option(help="URL of a server with OpenAI's API to stand in front of; again for several."),
]
Speculate = Annotated[str | None, typer.Option(help="Guess ahead: ngram, or a model.")]
File = Annotated[Path | None, typer.Option(help="TOML file; flags win over it.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, e.g. fleet.0.cache.prefix=false.")
]
IsPrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the whole configuration and end.")
]
Logs = Annotated[Path | None, typer.Option(help="Folder for the event logs.")]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(envvar="PENSTOCK_API_KEY", help="Key that callers must send."),
]
DrainTimeout = Annotated[float | None, typer.Option(help="Seconds to drain [60].")]


@app.command()
def serve(  # noqa: PLR0913 - every argument is a flag
    model: Model = None,
    host: Host = None,
    port: Port = None,
    device: Device = None,
    dtype: Dtype = None,
    weights: Weights = None,
    kv: Kv = None,
    policy: Policy = None,
    replicas: Replicas = None,
    route: Route = None,
    cluster: Cluster = None,
    lora_modules: LoraModules = None,
    remote: Remote = None,
    speculate: Speculate = None,
    config: File = None,
    sets: Sets = None,
    is_print_config: IsPrintConfig = False,
    log: Logs = None,
    api_key: ApiKey = None,
    drain_timeout: DrainTimeout = None,
) -> None:
    """Serve a model over OpenAI's HTTP API until Ctrl-C.

    Example: `penstock serve`, then `curl http://127.0.0.1:8000/v1/models`

    In front of other servers (vLLM, SGLang, llama.cpp, Ollama): `penstock serve --remote http://a:8000 --remote http://b:8000`
    """
    flags = {
        "gateway.host": host,
        "gateway.port": port,
        "gateway.api_keys": dict.fromkeys(api_key, "default") if api_key else None,
        "fleet.0.executor.device": device,
        "fleet.0.executor.dtype": dtype,
        "fleet.0.executor.weights": weights,
        "fleet.0.executor.kv": kv,
        "fleet.0.policy.preset": policy,
        "fleet.0.replicas": replicas,
        "fleet.0.policy.route": route,
        "serve.ray.address": cluster,
        "fleet.0.remote.urls": remote or None,
        "fleet.0.speculation": guessed_by(speculate),
        "fleet.0.adapters": adapters_named(lora_modules) if lora_modules else None,
        "log.dir": log,
        "serve.drain_timeout_s": drain_timeout,
    }
    built = load_config(config, model=model, sets=sets or (), flags=flags)
    if is_print_config:
        typer.echo(print_config(built), nl=False)
        return
    _log_to_stderr()
    if not run(built, on_phase=_say, on_ready=_welcome):
        raise typer.Exit(1)


def guessed_by(told: str | None) -> dict[str, str] | None:
    """The table of --speculate."""
    if told is None:
        return None
    return {"method": told} if told == "ngram" else {"method": "draft", "model": told}


def adapters_named(told: Sequence[str]) -> dict[str, str]:
    """NAME=FOLDER of each. Raises BadConfig."""
    found: dict[str, str] = {}
    for one in told:
        name, equals, folder = one.partition("=")
        if not (name and equals and folder) or name in found:
            raise BadConfig(
                f"--lora-modules wants NAME=FOLDER, each name once; got {one!r}",
                hint="repeat the flag for several: --lora-modules a=/adapters/a --lora-modules b=/adapters/b",
            )
        found[name] = folder
    return found


def _log_to_stderr() -> None:
    """What the engines say, and warnings of all others."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("penstock").setLevel(logging.INFO)


def _say(phase: str) -> None:
    typer.echo(f"penstock: {phase}", err=True)


EXAMPLES: dict[Use, tuple[str, dict[str, object]]] = {
    "writes": ("completions", {"prompt": "def ", "max_tokens": 32, "stream": True}),
    "embeds": ("embeddings", {"input": "a sentence"}),
    "ranks": ("rerank", {"query": "a question", "documents": ["one answer", "another"]}),
}


def _welcome(ready: Ready) -> None:
    fleets = ready.config.fleet
    runs_on = "; ".join(sorted({about for about in ready.abouts if about}))
    presets = dict.fromkeys(str(fleet.policy.get("preset", "vllm-v1")) for fleet in fleets)
    if any(fleet.remote is None for fleet in fleets):
        told = f"{ready.num_blocks} blocks of {fleets[0].cache.block_size} tokens, policy {', '.join(presets)}"
    else:
        told = f"route {policy_tables(fleets[0].policy, True)['route']['name']}"
    typer.echo(
        f"penstock: ready at {ready.url}/v1 - {', '.join(ready.models)} on {runs_on}, {told}"
    )
    path, fields = EXAMPLES[ready.use]
    body = json.dumps({"model": ready.models[0], **fields})
    key = ' -H "authorization: Bearer $PENSTOCK_API_KEY"' if ready.config.gateway.api_keys else ""
    typer.echo(
        f"  curl -N {ready.url}/v1/{path} -H 'content-type: application/json'{key} -d '{body}'"
    )
