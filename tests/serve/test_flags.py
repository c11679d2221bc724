"""What the flags of `penstock serve` make of the configuration; which there are is told in tests/verbs."""

from __future__ import annotations

import tomllib
from pathlib import Path

from typer.testing import CliRunner

from penstock.verbs.serve import app


def test_print_config_shows_what_the_flags_made(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text("seed = 5\n[[fleet]]\nname = 'mine'\n")
    args = [
        "--config",
        str(file),
        "--port",
        "81",
        "--policy",
        "sglang",
        "--set",
        "fleet.0.replicas=2",
    ]
    result = CliRunner().invoke(app, [*args, "--api-key", "s3cret", "--print-config"])
    assert result.exit_code == 0, result.output
    told = tomllib.loads(result.output)
    assert (told["seed"], told["gateway"]["port"]) == (5, 81)
    assert (told["fleet"][0]["name"], told["fleet"][0]["replicas"]) == ("mine", 2)
    assert told["fleet"][0]["policy"]["batch"]["name"] == "sglang"
    assert "s3cret" not in result.output
