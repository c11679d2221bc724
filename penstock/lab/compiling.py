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

modules = mypycify(
    [*sys.stdin.read().split(), "--cache-dir=types"], opt_level="2", debug_level="0", multi_file=True
)
if sys.platform != "win32":
    for module in modules:  # nobody else calls what is inside: calls go straight, and may be put in line
        module.extra_compile_args += ["-fvisibility=hidden", "-fno-semantic-interposition"]
setup(name="compiled", packages=[], ext_modules=modules, script_args=["build_ext", "--inplace"])
"""
TRIAL = """
from importlib import import_module
from penstock.core.compiled import MODULES, is_active

assert is_active(), "it is not found"
for module in MODULES:
    import_module(f"penstock.{module}")
"""
IGNORED = ("*.so", "__pycache__", "ui", "source", "default_model", "data")


class NotCompiled(PenstockError):
    """The modules could not be compiled; everything goes on in plain Python."""


def compile_modules(*, scratch: Path | None = None) -> Path:
    """The folder with the compiled modules, made now if it is not there. Raises NotCompiled, MissingExtra."""
    place = Path(compiled.folder())
    if compiled.whole(str(place)):
        return place
    for module in ("mypyc", "setuptools"):
        if find_spec(module) is None:
            raise missing_extra(module, "fast")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch) as name:
            copy = Path(name)
            _copy(copy)
            _build(copy)
            _keep(copy, place)
    except OSError as error:
        raise NotCompiled(
            f"what is compiled cannot be kept in {place.parent}: {error}",
            hint="XDG_CACHE_HOME names another folder for it, TMPDIR one to work in",
        ) from error
    _try(place)
    return place


def remove_all() -> None:
    """Remove what was compiled of every version; everything is plain Python again."""
    shutil.rmtree(compiled.root(), ignore_errors=True)
    if os.path.exists(compiled.root()):
        raise NotCompiled(f"{compiled.root()} could not be removed: is it yours?")


def _copy(copy: Path) -> None:
    """Its files can be written to, whoever owns the package and whatever is allowed with it."""
    package = copy / "penstock"
    ignored = shutil.ignore_patterns(*IGNORED)
    shutil.copytree(compiled.PACKAGE, package, ignore=ignored, copy_function=shutil.copyfile)
    for folder in (package, *(path for path in package.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    (copy / "mypy.ini").write_text(CONFIG)
    (copy / "setup.py").write_text(SETUP)
    inherited = _inherited(package)
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
    """In one move, so that nobody finds half of it. Of two that compile at once the first one's is kept."""
    with tempfile.TemporaryDirectory(dir=place.parent) as name:
        made = Path(name) / "made"
        for file in copy.rglob(f"*{EXTENSION_SUFFIXES[0]}"):
            relative = file.relative_to(copy)
            if relative.parts[0] != "build":
                (made / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, made / relative)
        (made / compiled.DONE).write_text("\n".join(sorted(compiled.files_in(str(made)))))
        if place.exists() and not compiled.whole(str(place)):
            shutil.rmtree(place)  # it has lost something
        try:
            os.replace(made, place)
        except OSError:
            if not compiled.whole(str(place)):
                raise


def _try(place: Path) -> None:
    """Take it away again if it cannot be loaded here: it would break every command."""
    paths = (str(Path(compiled.PACKAGE).parent), os.environ.get("PYTHONPATH", ""))
    found = {compiled.SWITCH: "on", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    told = subprocess.run(
        [sys.executable, "-c", TRIAL],
        capture_output=True,
        text=True,
        env={**os.environ, **found},
    )
    if told.returncode:
        shutil.rmtree(place, ignore_errors=True)
        raise NotCompiled(
            f"what was compiled cannot be loaded: {told.stderr[-2000:]}",
            hint="everything works without compiled modules, in plain Python",
        )
