"""Compiled modules are found if they were made of these very sources, and nothing else is."""

from __future__ import annotations

import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from penstock.core import compiled

SUFFIX = EXTENSION_SUFFIXES[0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own, and a list of finders that is put back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    return tmp_path


def kept(*names: str) -> Path:
    """A folder of compiled modules, which nobody loads here."""
    place = Path(compiled.folder())
    for name in names:
        file = place.joinpath(*name.split(".")).with_name(name.rpartition(".")[2] + SUFFIX)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (place / compiled.DONE).write_text("\n".join(names))
    return place


def test_without_a_folder_nothing_is_installed(cache: Path) -> None:
    compiled.install()
    assert not compiled.is_active()


def test_modules_of_the_folder_are_found_by_their_names(cache: Path) -> None:
    place = kept("penstock.engine.fork", "0123__mypyc")
    compiled.install()
    assert compiled.is_active()
    finder = sys.meta_path[0]
    assert isinstance(finder, compiled.CompiledFinder)
    found = finder.find_spec("penstock.engine.fork", None)
    assert found is not None and found.origin == str(
        place / "penstock" / "engine" / f"fork{SUFFIX}"
    )
    assert finder.find_spec("0123__mypyc", None) is not None
    assert finder.find_spec("penstock.engine.ledger", None) is None


def test_half_a_folder_and_a_switch_leave_all_plain(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = kept("penstock.engine.fork")
    monkeypatch.setenv(compiled.SWITCH, "off")
    compiled.install()
    assert not compiled.is_active()
    monkeypatch.delenv(compiled.SWITCH)
    (place / compiled.DONE).unlink()
    compiled.install()
    assert not compiled.is_active()


def test_a_folder_that_has_lost_a_module_leaves_all_plain(cache: Path) -> None:
    place = kept("penstock.engine.fork", "penstock.core.job")
    (place / "penstock" / "core" / f"job{SUFFIX}").unlink()
    compiled.install()
    assert not compiled.is_active()


def test_sources_that_cannot_be_read_are_plain(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept("penstock.engine.fork")
    monkeypatch.setattr(compiled, "_sources", lambda: [str(cache / "missing.py")])
    compiled.install()
    assert not compiled.is_active()


@pytest.mark.parametrize("changed", ["engine/fork.py", "core/plans.py"])
def test_other_sources_have_another_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """Those that stay plain too: where a field of a named tuple stands is compiled in."""
    package = tmp_path / "penstock"
    for path in compiled._sources():
        file = package / Path(path).relative_to(compiled.PACKAGE)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, file)
    before = compiled.folder()
    monkeypatch.setattr(compiled, "PACKAGE", str(package))
    assert compiled.folder() == before
    with (package / changed).open("a") as source:
        source.write("# another\n")
    assert compiled.folder() != before


@pytest.mark.parametrize("what", ["version", "libc"])
def test_another_python_or_c_library_has_another_folder(
    cache: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    before = compiled.folder()
    if what == "version":
        monkeypatch.setattr(sys, "version", "3.11.99")
    else:
        monkeypatch.setattr(compiled, "_libc", lambda: "glibc 9.9")
    assert compiled.folder() != before
