"""The commands of the tutorials run, in order, as a reader would type them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "tutorials"
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_first_simulation(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="reports need the extra lab")
    pytest.importorskip("pyarrow", reason="sweeps need the extra lab")
    shutil.copy(FOLDER / "requests.csv", tmp_path)
    told = run_all(FOLDER / "first-simulation.md", tmp_path)
    assert "600 of 600 rows" in told[0] and "dispersion" in told[0]
    assert "SIMULATED" in told[2] and "600 finished" in told[2]
    assert "requests-69" in told[3] and "queueing" in told[3]
    assert "90" in told[4] and "sglang" in told[4]
    assert (tmp_path / "report.html").stat().st_size > 1e6
    assert (tmp_path / "sweep" / "results.parquet").is_file()
    assert (tmp_path / "sweep" / "report.html").is_file()


def run_all(page: Path, folder: Path) -> list[str]:
    """What each block of the page printed. `penstock` is the one of this interpreter."""
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "120",
    }
    told = []
    for block in BLOCK.findall(page.read_text()):
        ended = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert ended.returncode == 0, f"{block}\n{ended.stdout}\n{ended.stderr}"
        told.append(ended.stdout)
    return told
