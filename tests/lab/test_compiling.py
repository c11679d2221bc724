"""What mypyc makes of the modules says the same as their sources, to the byte.

Compiling takes minutes: a test that does is slow. Where these very sources are compiled already, the runs are compared
by default.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import stat
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import pytest

from penstock.core import compiled
from penstock.lab import compiling
from penstock.lab.compiling import NotCompiled, _copy, _keep, _opened, compile_modules, remove_all

ROOT = Path(__file__).parents[2]
RUNS = """
import json, sys
from pathlib import Path
from penstock.assemble import load_config
from penstock.core.compiled import is_active
from penstock.lab.simulate import simulate
from penstock.traffic import open_trace

found = [is_active()]
for trace, speed, limit, *sets in json.loads(sys.argv[1]):
    traffic = open_trace(Path("data") / trace, limit=limit, speed=speed, model="llama-3.1-8b")
    run = simulate(load_config(Path("examples/azure_a100.toml"), sets=sets), traffic)
    found.append((run.digest, str(run.figures.to_dict())))
print(json.dumps(found))
"""
AZURE, MOONCAKE = "azure_2023_conv_200.csv", "mooncake_conversation_100.jsonl"
POLICY = "fleet.0.policy"
CASES = (
    (AZURE, 20.0, 100, "fleet.0.replicas=1", "fleet.0.cache.num_blocks=400"),  # preempts
    (AZURE, 4.0, 60, "is_checked=true"),
    (AZURE, 4.0, 80, f"{POLICY}.preset=sglang", f"{POLICY}.route=p2c"),
    (AZURE, 4.0, 60, f"{POLICY}.batch=layered"),
    (AZURE, 4.0, 60, f"{POLICY}.batch=flow-prefill"),  # plans that yield
    (AZURE, 4.0, 60, f"{POLICY}.route=llumnix", f"{POLICY}.move=llumnix"),
    (MOONCAKE, 4.0, 40, f"{POLICY}.route=prefix", "fleet.0.cache.store=radix"),
)


def told(switch: str) -> list[object]:
    env = {**os.environ, compiled.SWITCH: switch, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUNS, json.dumps(CASES)]
    ended = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found: list[object] = json.loads(ended.stdout)
    return found


def compare() -> None:
    plain, fast = told("off"), told("on")
    assert plain[0] is False and fast[0] is True
    assert fast[1:] == plain[1:] and len(plain) == len(CASES) + 1


def test_compiled_modules_give_the_same_log_where_they_are_at_hand() -> None:
    if not compiled.whole(compiled.folder()):
        pytest.skip("these sources are not compiled here: penstock compile")
    compare()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiling_gives_the_same_log() -> None:
    has_compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    if find_spec("mypyc") is None or not has_compiler:
        pytest.skip("needs mypyc (the extra `fast`) and a C compiler")
    compile_modules()
    compare()


def test_classes_that_others_inherit_from_are_declared_to_allow_it() -> None:
    source = (
        '"""Text."""\n\nfrom __future__ import annotations\n\nimport x\n\n\n'
        "@x.word(1)\nclass One: ...\n\n\nclass Two: ...\n"
    )
    opened = _opened(source, {"One"})
    one, two = [node for node in ast.parse(opened).body if isinstance(node, ast.ClassDef)]
    assert len(one.decorator_list) == 2 and not two.decorator_list
    assert _opened(source, {"Other"}) == source


def test_records_of_compiled_modules_have_their_settings_from_parents() -> None:
    """What else a class says in its brackets is lost when it is compiled."""
    for module in compiled.MODULES:
        for node in ast.walk(ast.parse(compiling._file(ROOT, module).read_text())):
            if isinstance(node, ast.ClassDef):
                parents = {base.id for base in node.bases if isinstance(base, ast.Name)}
                told = {keyword.arg for keyword in node.keywords}
                said = {"frozen"} if "Fact" in parents else set()
                assert "TypedDict" in parents or told <= said, (module, node.name)


def test_slices_of_compiled_modules_call_nothing_that_does_something() -> None:
    """mypyc 2.4 takes the bounds of a slice of a memoryview twice: what went through a pipe went twice."""
    for module in compiled.MODULES:
        for node in ast.walk(ast.parse(compiling._file(ROOT, module).read_text())):
            if isinstance(node, ast.Slice):
                calls = [each.func for each in ast.walk(node) if isinstance(each, ast.Call)]
                names = {ast.unparse(each).rpartition(".")[2] for each in calls}
                assert names <= {"len", "find", "lstrip", "_written"}, (module, node.lineno)


def test_removing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old = Path(compiled.root()) / "of-an-older-version"
    old.mkdir(parents=True)
    (old / compiled.DONE).touch()
    remove_all()
    assert not Path(compiled.root()).exists()
    remove_all()  # nothing there is as good


def made(tmp_path: Path) -> tuple[Path, Path]:
    """(a copy with two modules built, where they are to be kept)"""
    copy, place = tmp_path / "copy", tmp_path / "kept" / "0123"
    for name in ("job", "canvas"):
        file = copy / "penstock" / "core" / f"{name}{EXTENSION_SUFFIXES[0]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    place.parent.mkdir()
    return copy, place


def test_half_a_folder_is_made_anew_and_a_whole_one_left_alone(tmp_path: Path) -> None:
    copy, place = made(tmp_path)
    (place / "penstock").mkdir(parents=True)  # as somebody who clears caches may leave it
    _keep(copy, place)
    assert compiled.whole(str(place)).keys() == {"penstock.core.job", "penstock.core.canvas"}
    mark = place / "mark"
    mark.touch()
    _keep(copy, place)  # the second of two that have compiled at once
    assert mark.exists() and [one.name for one in place.parent.iterdir()] == [place.name]


def test_where_nothing_can_be_kept_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(compiling, "find_spec", lambda module: module)
    with pytest.raises(NotCompiled, match="cannot be kept"):
        compile_modules()


def test_what_cannot_be_loaded_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling, "TRIAL", "raise ImportError('another libc')")
    place = Path(compiled.folder())
    place.mkdir(parents=True)
    with pytest.raises(NotCompiled, match="another libc"):
        compiling._try(place)
    assert not place.exists()


def test_a_package_that_nobody_may_write_to_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "penstock"
    (package / "core").mkdir(parents=True)
    (package / "core" / "job.py").write_text("from __future__ import annotations\n")
    monkeypatch.setattr(compiled, "PACKAGE", str(package))
    monkeypatch.setattr(compiled, "MODULES", ("core.job",))
    for path in (package / "core" / "job.py", package / "core", package):
        path.chmod(0o555)
    try:
        (tmp_path / "copy").mkdir()
        _copy(tmp_path / "copy")
    finally:
        for path in (package, package / "core"):
            path.chmod(0o755)
    for path in (tmp_path / "copy" / "penstock").rglob("*"):
        assert path.stat().st_mode & stat.S_IWUSR
