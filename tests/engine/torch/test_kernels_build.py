"""Building the kernels: once, whole, and never a condition for anything else to work."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from penstock.engine.torch import kernels
from penstock.engine.torch.kernels import build
from penstock.engine.torch.open import EngineConfig, open_executor
from tests.engine.torch.models import saved

FAKE_COMPILER = """#!/bin/sh
echo "$@" >> {log}
for word in "$@"; do [ "$previous" = -o ] && output=$word; previous=$word; done
case "$*" in *{broken}*) echo no such instruction set; exit 1;; esac
sleep 0.2
[ -z "$output" ] || echo made > "$output"
"""


def fake_compiler(folder: Path, broken: str = "nothing-is-broken") -> tuple[str, Path]:
    log, script = folder / "log", folder / "c++"
    script.write_text(FAKE_COMPILER.format(log=log, broken=broken))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script), log


def linked(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "-shared" in line]


def test_two_that_start_together_compile_once(tmp_path: Path) -> None:
    compiler, log = fake_compiler(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        paths = set(
            pool.map(lambda _: build.build(tmp_path / "cache", compiler=compiler), range(2))
        )
    assert len(paths) == 1 and paths.pop().read_text() == "made\n"
    assert len(linked(log)) == 1


def test_an_unknown_instruction_set_is_left_out(tmp_path: Path) -> None:
    compiler, log = fake_compiler(tmp_path, broken="mavx2")
    build.build(tmp_path / "cache", compiler=compiler, variants=[build.AVX2, build.PORTABLE])
    assert "portable.o" in linked(log)[0] and "avx2.o" not in linked(log)[0]


def test_a_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, _ = fake_compiler(tmp_path, broken="entry.cpp")
    with pytest.raises(build.BuildFailed, match="no such instruction set"):
        build.build(tmp_path / "cache", compiler=compiler)
    assert not list((tmp_path / "cache").rglob("*.so"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildFailed, match="no C"):
        build.build(tmp_path / "cache")


def test_everything_works_without_a_compiler(
    tmp_path: Path,
) -> None:
    x, weight = torch.randn(2, 32), torch.randn(32)
    wanted = kernels.rms_norm(x, weight, 1e-6)
    kernels.build_with("/no/such/compiler", tmp_path)
    try:
        assert not kernels.available() and "cannot run" in str(kernels.why_not())
        assert kernels.isas() == []
        assert not kernels.CpuPagedAttention.available_for(64, 16, torch.float32)
        torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-6), wanted)
    finally:
        kernels.build_with(None, None)


async def test_an_engine_names_its_compiler_and_its_folder(
    tmp_path: Path, model_root: Path
) -> None:
    """A compiler that is not there costs the kernels and nothing else; the notes say why."""
    folder, _ = saved(model_root, "llama2")
    config = EngineConfig(
        device="cpu", num_blocks=8, compiler="/no/such/compiler", kernel_cache=tmp_path / "kernels"
    )
    try:
        executor = open_executor(str(folder), config)
        assert "/no/such/compiler" in executor.notes["attention"]
        await executor.stop()
    finally:
        kernels.build_with(None, None)
