"""The command line: its flags are frozen, its help needs nothing heavy, its errors are a line and a hint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from penstock.__main__ import VERBS, build_app, run
from penstock.report.log import LogWriter
from tests.report.test_log import HEADER

ROOT = Path(__file__).parents[2]

# A flag is a promise. Before adding one: does `--set a.b=v` or the configuration file not do?
FLAGS: dict[str, set[str]] = {
    "bench agreement": {
        "--prompts", "--max-tokens", "--retention", "--refresh-every", "--threshold", "--steps",
        "--device", "--dtype", "--json",
    },
    "bench calibrate": {
        "--device", "--dtype", "--weights", "--threads", "--policy", "--log", "--out", "--quick", "--scheduler-only",
        "--json",
    },
    "bench engine": {
        "--model", "--peer", "--weights", "--threads", "--only", "--repeats", "--context", "--steps", "--prefills",
        "--requests", "--port", "--scratch", "--from", "--page", "--out", "--json",
    },
    "bench faults": {"--seeds", "--first", "--fault", "--log", "--json"},
    "bench gate": {"--op-tables", "--plot", "--json"},
    "bench quality": {"--weights", "--kv", "--text", "--context", "--tokens", "--json"},
    "bench url": {
        "--trace", "--format", "--columns", "--limit", "--speed", "--rate", "--model", "--api-key", "--chat",
        "--slo-ttft", "--slo-tpot", "--promise", "--concurrency-cap", "--timeout", "--tokenizer", "--seed", "--out",
        "--plot", "--json",
    },
    "bench validate": {
        "--trace", "--profile", "--loads", "--repeats", "--requests", "--neighbour-limit", "--device", "--dtype",
        "--policy", "--quick", "--out", "--plot", "--json",
    },
    "chat": {"--model", "--api-key", "--system", "--complete", "--max-tokens"},
    "plan images": {"--trace", "--ttft", "--tpot", "--requests", "--set", "--json"},
    "compile": {"--remove", "--json"},
    "plan pipeline": {
        "--lengths", "--trace", "--tokens", "--sharing", "--quick", "--set", "--out", "--plot", "--json",
    },
    "plan placement": {
        "--gpu", "--ttft", "--tpot", "--gpus", "--nodes", "--fast-links", "--lengths", "--trace", "--demand",
        "--tables", "--plot", "--json",
    },
    "replay": {"--json"},
    "report": {"--out", "--json", "--perfetto", "--otel", "--request", "--title"},
    "reproduce": {
        "--list", "--full", "--quick", "--seeds", "--data", "--processes", "--out", "--keep", "--plot", "--json",
    },
    "serve": {
        "--host", "--port", "--device", "--dtype", "--weights", "--kv", "--policy", "--config", "--set",
        "--print-config", "--log", "--api-key", "--lora-modules", "--speculate", "--drain-timeout",
        "--replicas", "--route", "--cluster", "--remote",
    },
    "simulate": {
        "--trace", "--columns", "--limit", "--speed", "--rate", "--model", "--seed", "--slo-ttft", "--slo-tpot",
        "--set", "--log", "--sweep", "--compare", "--seeds", "--processes", "--ray", "--out", "--report", "--json",
    },
    "trace card": {
        "--format", "--columns", "--limit", "--speed", "--rate", "--seed", "--plot", "--json",
    },
    "trace fit": {
        "--format", "--columns", "--limit", "--out", "--window", "--lengths", "--seeds", "--json",
    },
    "trace generate": {
        "--out", "--format", "--columns", "--limit", "--speed", "--rate", "--seed", "--json",
    },
    "top": {"--every", "--once", "--api-key", "--json"},
    "train default": {"--out", "--minutes", "--resume", "--fresh", "--device", "--runs", "--card", "--no-card"},
    "train diffusion": {"--out", "--steps", "--seed", "--runs"},
    "version": {"--json"},
}  # fmt: skip


def flags_of(verb: str) -> dict[str, set[str]]:
    """The flags of a verb and of its commands, by name."""
    group = typer.main.get_command(build_app(verb))
    command = group.commands[verb]  # type: ignore[attr-defined]
    inner = getattr(command, "commands", None)
    found = {verb: command} if inner is None else {f"{verb} {n}": c for n, c in inner.items()}
    return {
        name: {
            flag
            for parameter in each.params
            if parameter.param_type_name == "option"
            for flag in (*parameter.opts, *parameter.secondary_opts)
        }
        for name, each in found.items()
    }


@pytest.mark.parametrize("verb", VERBS)
def test_flags_are_frozen(verb: str) -> None:
    found = flags_of(verb)
    assert found == {name: FLAGS[name] for name in found}
    assert {name for name in FLAGS if name.split()[0] == verb} == found.keys()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_it_does_with_an_example(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in flags_of(verb):
        assert run([*name.split(), "--help"]) == 0
        told = capsys.readouterr().out
        assert "Usage" in told and "xample" in told, name


def loaded(code: str) -> set[str]:
    """Modules that a fresh interpreter holds after running `code`."""
    script = f"{code}\nimport sys, json\nsys.stderr.write(json.dumps(sorted(sys.modules)))"
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in json.loads(ended.stderr)}


def test_policies_load_nothing_that_waits_computes_or_serves() -> None:
    found = loaded(
        "import penstock.policy as policy\n"
        "for kind, names in policy.TABLE.items():\n"
        "    policy.kind_module(kind)\n"
        "    for name in names: policy.find(kind, name)"
    )
    assert not found & {"asyncio", "torch", "starlette", "aiohttp", "uvicorn", "zmq"}


def test_a_plain_simulation_loads_only_what_it_needs() -> None:
    """Starting up is a good part of a short run."""
    args = ["simulate", "examples/azure_a100.toml", "--trace", "data/azure_2023_conv_200.csv"]
    found = loaded(
        f"from penstock.__main__ import run\nassert run({[*args, '--limit', '3', '--json']}) == 0"
    )
    assert "penstock" in found
    assert not found & {"rich", "zmq", "aiohttp", "uvicorn", "starlette", "tokenizers", "torch"}
    assert not found & {"scipy", "plotly", "pyarrow", "matplotlib", "jinja2", "yaml"}


@pytest.mark.parametrize(
    "code",
    [
        "import penstock",
        "from penstock.__main__ import run; run(['--help'])",
        "from penstock.__main__ import run; run(['version', '--json'])",
    ],
)
def test_help_and_version_load_nothing_heavy(code: str) -> None:
    heavy = {"torch", "numpy", "starlette", "aiohttp", "uvicorn", "zmq", "tokenizers", "matplotlib"}
    assert not loaded(code) & heavy


def test_routing_simulating_and_replaying_need_no_torch() -> None:
    modules = [
        "penstock.assemble", "penstock.gateway.app", "penstock.cluster.fleets", "penstock.lab.replay",
        "penstock.lab.simulate", "penstock.lab.bench", *(f"penstock.verbs.{verb}" for verb in VERBS),
    ]  # fmt: skip
    found = loaded(f"import {', '.join(modules)}")
    assert not found & {"torch", "safetensors", "matplotlib", "ray"}


def test_every_verb_is_a_file_and_every_file_a_verb() -> None:
    files = {path.stem for path in (ROOT / "penstock" / "verbs").glob("*.py")}
    parts = {
        "__init__",
        "agreement",
        "calibrate",
        "engine",
        "faults",
        "gate",
        "quality",
        "validate",
        "sweeping",
    }  # commands of bench, and sweeping, which is a part of simulate
    assert files - parts == set(VERBS)


def test_errors_are_a_line_and_a_hint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["replay", str(tmp_path / "none.jsonl")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("penstock: cannot open the log") and "Traceback" not in told
    (tmp_path / "x.csv").write_text("a,b\n")
    assert run(["bench", "http://127.0.0.1:1", "--trace", str(tmp_path / "x.csv")]) == 2
    assert "hint: readable are" in capsys.readouterr().err
    with pytest.raises(Exception, match="cannot open the log"):
        run(["--debug", "replay", str(tmp_path / "none.jsonl")])


def test_the_version_is_told_as_a_flag_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("penstock ") and run(["--version"]) == 0
    assert capsys.readouterr().out == told


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["nonsense"]) == 2
    assert run(["replay"]) == 2
    assert run(["bench", "http://x", "--trcae", "y"]) == 2
    assert run(["bench", "http://x", "--trace", "y", "--slo-ttft", "-1"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_log_without_mechanisms_cannot_be_replayed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = LogWriter(tmp_path / "a.jsonl")
    log.emit(HEADER)
    log.close()
    assert run(["replay", str(tmp_path)]) == 2
    assert "does not say how" in capsys.readouterr().err
