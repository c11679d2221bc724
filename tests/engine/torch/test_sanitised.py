"""The kernels under the compiler's sanitisers of addresses and of undefined behaviour."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from penstock.engine.torch.kernels import build

HERE = Path(__file__).parent
CALLERS = [HERE / f"{name}_sanitised.cpp" for name in ("linear", "attention", "small")]
FLAGS = ("-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
QUIET = ("-Wno-psabi", "-Wno-unknown-pragmas")


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("this compiler comes without sanitisers")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", [v.name for v in build.usable_variants()])
def test_kernels_stay_in_their_buffers(tmp_path: Path, variant: str) -> None:
    try:
        compiler = build.find_compiler()
    except build.BuildFailed as why:
        pytest.skip(str(why))
    chosen = next(v for v in build.BEST_FIRST if v.name == variant)
    command = [compiler, *FLAGS, *QUIET, *chosen.command(), "-pthread", f"-I{build.SOURCE}"]
    objects = []
    for part in ("variant", "entry"):
        objects.append(str(tmp_path / f"{part}.o"))
        run([*command, "-c", "-o", objects[-1], str(build.SOURCE / f"{part}.cpp")])
    for caller in CALLERS:
        made = str(tmp_path / caller.stem)
        run([*command, "-o", made, str(caller), *objects])
        run([made])
