"""The house rules that a machine can see: sizes, words, what may be said where. Exceptions carry a reason."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from penstock import policy

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "penstock"
FILES = sorted(PACKAGE.rglob("*.py"))
EXCEPTIONS = tomllib.loads((ROOT / "tests" / "house_exceptions.toml").read_text())

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
STDLIB_NAMES = {"call_exception_handler", "set_exception_handler"}  # overridden, not chosen
BANNED_WORDS = ("manager", "handler", "helper", "util", "common", "impl", "base")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text())))


def functions(path: Path) -> list[tuple[str, int]]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in nodes(path) if isinstance(node, kinds)]
    return [(node.name, (node.end_lineno or 0) - node.lineno + 1) for node in found]


def test_files_and_functions_are_small() -> None:
    large_files = EXCEPTIONS.get("files", {})
    large_functions = EXCEPTIONS.get("functions", {})
    found = []
    for path in FILES:
        lines = path.read_text().count("\n")
        if lines > MAX_FILE_LINES and name_of(path) not in large_files:
            found.append(f"{name_of(path)}: {lines} lines")
        for name, length in functions(path):
            if length > MAX_FUNCTION_LINES and f"{name_of(path)}:{name}" not in large_functions:
                found.append(f"{name_of(path)}:{name}: {length} lines")
    assert not found, "too large without a reason in tests/house_exceptions.toml:\n" + "\n".join(
        found
    )


def test_exceptions_are_still_needed() -> None:
    stale = []
    for name in EXCEPTIONS.get("files", {}):
        path = ROOT / name
        if not path.exists() or path.read_text().count("\n") <= MAX_FILE_LINES:
            stale.append(name)
    for name in EXCEPTIONS.get("functions", {}):
        file, _, function = name.partition(":")
        path = ROOT / file
        lengths = dict(functions(path)) if path.exists() else {}
        if lengths.get(function, 0) <= MAX_FUNCTION_LINES:
            stale.append(name)
    assert not stale, f"no longer needed in tests/house_exceptions.toml: {stale}"


@pytest.mark.parametrize("word", BANNED_WORDS)
def test_names_say_something(word: str) -> None:
    pattern = re.compile(rf"(^|_){word}s?($|_)")
    found = []
    for path in FILES:
        parts = [part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts]
        names = [*parts, *(name for name, _ in functions(path))]
        names += [node.name for node in nodes(path) if isinstance(node, ast.ClassDef)]
        found += [
            f"{name_of(path)}: {name}"
            for name in names
            if pattern.search(name.lower()) and name not in STDLIB_NAMES
        ]
    assert not found, "\n".join(found)


def test_rooms_say_what_they_are_and_refuse() -> None:
    rooms = [path for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "core"]
    silent = [name_of(path) for path in rooms if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent
    assert (PACKAGE / "core" / "__init__.py").read_text() == "", "core/__init__ must stay empty"


def test_every_module_explains_itself() -> None:
    silent = [
        name_of(path)
        for path in FILES
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def test_nothing_is_left_for_later() -> None:
    pattern = re.compile(r"\b(TODO|FIXME)\b|raise NotImplementedError\s*$", re.MULTILINE)
    found = [name_of(path) for path in FILES if pattern.search(path.read_text())]
    assert not found, found


def test_the_design_lists_every_policy() -> None:
    """The table of kinds in docs/design.md is the TABLE of policies, in its order."""
    rows = re.findall(
        r"^\| (\w+) \| .*\? \| (`.*`) \|$", (ROOT / "docs/design.md").read_text(), re.M
    )
    listed = {kind: re.findall(r"`([^`]+)`", names) for kind, names in rows}
    assert listed == {kind: list(names) for kind, names in policy.TABLE.items()}


def test_policies_load_without_the_world() -> None:
    """`import penstock.policy` and every policy in a fresh interpreter: no loop, no tensors, no web."""
    code = (
        "import sys, penstock.policy as p\n"
        "for kind in p.TABLE:\n"
        "    for name in p.TABLE[kind]: p.find(kind, name)\n"
        "heavy = {'asyncio', 'torch', 'starlette', 'aiohttp', 'ray', 'uvicorn'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
