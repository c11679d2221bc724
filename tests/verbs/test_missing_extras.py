"""An install without the extras: what routes, simulates and replays works; all else names the extra to install.

The packages are hidden from the verb and from every process it starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.engine.folder import DEFAULT_FOLDER

ROOT = Path(__file__).parents[2]
AZURE = str(ROOT / "data" / "azure_2023_conv_200.csv")
EXAMPLE = str(ROOT / "examples" / "azure_a100.toml")
HIDDEN = (
    "torch",
    "safetensors",
    "huggingface_hub",
    "matplotlib",
    "tqdm",
    "ray",
    "pyarrow",
    "plotly",
)


@pytest.fixture
def without(tmp_path: Path) -> dict[str, str]:
    """An environment in which HIDDEN cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({HIDDEN!r}))\n"
    )
    return {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HOME": str(tmp_path)}


def penstock(env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        [sys.executable, "-m", "penstock", *args],
        env=env,
        cwd=env["HOME"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended


def test_simulating_and_replaying_need_no_extra(without: dict[str, str]) -> None:
    args = ("simulate", EXAMPLE, "--trace", AZURE, "--limit", "10", "--log", "run.jsonl")
    ended = penstock(without, *args)
    assert ended.returncode == 0 and "SIMULATED" in ended.stdout, ended.stderr
    ended = penstock(without, "replay", "run.jsonl")
    assert ended.returncode == 0 and "identical" in ended.stdout, ended.stderr
    ended = penstock(without, "serve", "--print-config")
    assert ended.returncode == 0 and "[gateway]" in ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("args", "package", "extra"),
    [
        (("bench", "calibrate", "--quick"), "torch", "engine"),
        (("serve", "some/model", "--port", "0"), "huggingface-hub", "engine"),
        (("train", "default"), "torch", "train"),
        (("simulate", EXAMPLE, "--trace", AZURE, "--sweep", "rate=1,2"), "pyarrow", "lab"),
        (
            ("bench", "http://127.0.0.1:1", "--trace", AZURE, "--plot", "p.png"),
            "matplotlib",
            "plot",
        ),
    ],
)
def test_a_verb_that_needs_an_extra_names_it(
    without: dict[str, str], args: tuple[str, ...], package: str, extra: str
) -> None:
    ended = penstock(without, *args)
    assert ended.returncode == 2, ended.stderr
    assert f"{package!r}, which is not installed" in ended.stderr
    assert f"hint: pip install 'penstock[{extra}]'" in ended.stderr


@pytest.mark.parametrize("hidden", ["tqdm", "matplotlib"])
def test_training_looks_for_all_it_needs_first(without: dict[str, str], hidden: str) -> None:
    customise = Path(without["HOME"]) / "sitecustomize.py"
    customise.write_text(f"import sys\nsys.modules[{hidden!r}] = None\n")
    ended = penstock(without, "train", "default")
    assert ended.returncode == 2
    assert hidden in ended.stderr and "penstock[train]" in ended.stderr


@pytest.mark.skipif(
    not (DEFAULT_FOLDER / "model.safetensors").exists(), reason="the default model is not there"
)
def test_the_engines_process_says_so_too(without: dict[str, str]) -> None:
    ended = penstock(without, "serve", "--port", "0")
    assert ended.returncode == 2, ended.stderr
    assert "'torch', which is not installed" in ended.stderr
    assert "penstock[engine]" in ended.stderr
