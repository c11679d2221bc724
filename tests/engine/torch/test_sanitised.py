"""The linear kernels under the compiler's sanitisers of addresses and of undefined behaviour."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from penstock.engine.torch.kernels import build

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
QUIET = ("-Wno-psabi", "-Wno-unknown-pragmas")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", [v.name for v in build.usable_variants()])
def test_linear_layers_stay_in_their_buffers(tmp_path: Path, variant: str) -> None:
    try:
        compiler = build.find_compiler()
    except build.BuildFailed as why:
        pytest.skip(str(why))
    chosen = next(v for v in build.BEST_FIRST if v.name == variant)
    sources = [
        build.SOURCE / "variant.cpp",
        build.SOURCE / "entry.cpp",
        HERE / "linear_sanitised.cpp",
    ]
    made = tmp_path / "sanitised"
    command = [compiler, *FLAGS, *QUIET, *chosen.command(), "-pthread", f"-I{build.SOURCE}"]
    done = subprocess.run(
        [*command, "-o", str(made), *map(str, sources)], capture_output=True, text=True
    )
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("this compiler comes without sanitisers")
    assert done.returncode == 0, done.stderr[-2000:]
    ran = subprocess.run([str(made)], capture_output=True, text=True)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
