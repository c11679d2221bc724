"""Compiles the modules of core.compiled with mypyc, and keeps the result where that module looks for it.

The whole package is copied, because types are needed of what stays plain Python too, and mypyc makes one library of all
modules, so that they call each other as C does. Two things are written into the copy that the sources do not say:
classes that others inherit from in plain Python are declared to allow it.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

from penstock.core import compiled
from penstock.core.errors import PenstockError, missing_extra

CONFIG = "[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n"
SETUP = """
import sys
from setuptools import setup
from mypyc.build import mypycify

setup(
    name="compiled",
    packages=[],
    ext_modules=mypycify(
        [*sys.stdin.read().split(), "--cache-dir=types"], opt_level="2", debug_level="0", multi_file=True
    ),
    script_args=["build_ext", "--inplace"],
)
"""
IGNORED = ("*.so", "__pycache__", "ui", "source", "default_model", "data")


class NotCompiled(PenstockError):
    """The modules could not be compiled; everything goes on in plain Python."""


def compile_modules(*, scratch: Path | None = None) -> Path:
    """The folder with the compiled modules, made now if it is not there."""
    place = Path(compiled.folder())
    if (place / compiled.DONE).exists():
        return place
    for module in ("mypyc", "setuptools"):
        if find_spec(module) is None:
            raise missing_extra(module, "fast")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        copy = Path(name)
        _copy(copy)
        _build(copy)
        _keep(copy, place)
    return place


def remove_all() -> None:
    """Remove what was compiled of every version; everything is plain Python again."""
    shutil.rmtree(compiled.root(), ignore_errors=True)
    if os.path.exists(compiled.root()):
        raise NotCompiled(f"{compiled.root()} could not be removed: is it yours?")


def _copy(copy: Path) -> None:
    shutil.copytree(compiled.PACKAGE, copy / "penstock", ignore=shutil.ignore_patterns(*IGNORED))
    (copy / "mypy.ini").write_text(CONFIG)
    (copy / "setup.py").write_text(SETUP)
    inherited = _inherited(copy / "penstock")
    for module in compiled.MODULES:
        file = _file(copy, module)
        file.write_text(_opened(file.read_text(), inherited))


def _file(copy: Path, module: str) -> Path:
    return copy.joinpath("penstock", *module.split(".")).with_suffix(".py")


def _inherited(package: Path) -> set[str]:
    """Names of classes that plain modules inherit from."""
    ours = {_file(package.parent, module) for module in compiled.MODULES}
    found = set()
    for file in package.rglob("*.py"):
        if file in ours:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                found |= {base.id for base in node.bases if isinstance(base, ast.Name)}
    return found


def _opened(source: str, inherited: set[str]) -> str:
    """The source with a word before each class that others inherit from."""
    lines = source.splitlines()
    places = [
        min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name in inherited
    ]
    if not places:
        return source
    for place in reversed(places):
        lines.insert(place, "@_mypyc_attr(allow_interpreted_subclasses=True)")
    future = lines.index("from __future__ import annotations")
    lines.insert(future + 1, "from mypy_extensions import mypyc_attr as _mypyc_attr")
    return "\n".join(lines) + "\n"


def _build(copy: Path) -> None:
    told = subprocess.run(
        [sys.executable, "setup.py"],
        cwd=copy,
        input=" ".join(str(_file(copy, module).relative_to(copy)) for module in compiled.MODULES),
        capture_output=True,
        text=True,
        env={**os.environ, compiled.SWITCH: "off", "PYTHONPATH": ""},
    )
    if told.returncode:
        raise NotCompiled(
            f"mypyc or the C compiler failed: {(told.stdout + told.stderr)[-3000:]}",
            hint="everything works without compiled modules, in plain Python",
        )


def _keep(copy: Path, place: Path) -> None:
    """In one move, so that nobody finds half of it."""
    with tempfile.TemporaryDirectory(dir=place.parent) as name:
        made = Path(name) / "made"
        for file in copy.rglob(f"*{EXTENSION_SUFFIXES[0]}"):
            relative = file.relative_to(copy)
            if relative.parts[0] != "build":
                (made / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, made / relative)
        (made / compiled.DONE).write_text(compiled.SWITCH)
        if not place.exists():
            os.replace(made, place)
