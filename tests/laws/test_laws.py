"""Every policy of the table keeps the law of its kind, decides the same twice, and touches nothing."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import inspect
import random
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import astuple

from penstock.core.config import build
from penstock.core.errors import BadConfig
from penstock.policy import KINDS, TABLE, find, kind_module
from tests.laws.views import VIEWS, Glass

ENTRIES = [(kind, name) for kind, names in TABLE.items() for name in names]
each_policy = pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=lambda word: word)
relaxed = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
seeds = st.integers(0, 2**32 - 1)


def decisions(kind: str, name: str, seed: int, length: int = 4) -> list[Any]:
    """What a fresh policy says to a stream of views, each held against the law."""
    rng, policy, law = random.Random(seed), find(kind, name)(), kind_module(kind).law
    said = []
    for _ in range(length):
        view = VIEWS[kind](rng)
        if view is not None:
            decision = policy.decide(view)
            law(view, decision)
            said.append(decision)
    return said


def plain(thing: Any) -> Any:
    """A decision with jobs and blocks replaced by what names them."""
    if isinstance(thing, Glass):
        return ("job", thing.seq)
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return [plain(getattr(thing, f.name)) for f in dataclasses.fields(thing)]
    if isinstance(thing, Struct):
        return [plain(value) for value in astuple(thing)]
    if isinstance(thing, (list, tuple)):
        return [plain(item) for item in thing]
    return thing if isinstance(thing, (str, int, float, type(None))) else type(thing).__name__


def test_every_kind_of_the_table_has_views() -> None:
    assert set(TABLE) <= set(KINDS)
    assert set(TABLE) <= set(VIEWS), (
        "a kind has policies but tests/laws/views.py makes no views of it"
    )


@each_policy
@relaxed
@given(seed=seeds)
def test_law_holds_and_decisions_repeat(kind: str, name: str, seed: int) -> None:
    assert plain(decisions(kind, name, seed)) == plain(decisions(kind, name, seed))


@each_policy
@relaxed
@given(seed=seeds)
def test_views_are_left_alone(kind: str, name: str, seed: int) -> None:
    view = VIEWS[kind](random.Random(seed))
    if view is None:
        return
    jobs = [*getattr(view, "running", ()), *getattr(view, "waiting", ())]
    before = [copy.copy(job._job) for job in jobs]
    names = [job.seq for job in jobs]
    ledger = getattr(view, "ledger", None)
    held = ledger and (ledger.free, {seq: len(table) for seq, table in ledger.tables.items()})
    find(kind, name)().decide(view)
    jobs_after = [*getattr(view, "running", ()), *getattr(view, "waiting", ())]
    assert [job.seq for job in jobs_after] == names
    for job, old in zip(jobs, before, strict=True):
        kinds = type(old).__mro__  # a kind of job names its own fields only
        for field in [name for kind in kinds for name in getattr(kind, "__slots__", ())]:
            assert getattr(job, field) == getattr(old, field)
    if ledger:
        assert held == (ledger.free, {seq: len(table) for seq, table in ledger.tables.items()})


def test_the_glass_refuses_writing() -> None:
    view = VIEWS["order"](random.Random(5))
    with pytest.raises(AttributeError, match="num_output"):
        view.waiting[0].num_output = 3


@each_policy
def test_parameters_come_from_configuration(kind: str, name: str) -> None:
    cls = find(kind, name)
    fields = [f for f in dataclasses.fields(cls) if f.init]
    told = {f.name: f.default for f in fields if f.default not in (None, dataclasses.MISSING)}
    assert build(cls, told) == build(cls, {})
    with pytest.raises(BadConfig, match="no_such_parameter"):
        build(cls, {"no_such_parameter": 1})
    for f in dataclasses.fields(cls):
        assert f.init != f.name.startswith("_"), f"{f.name}: state is private, parameters are not"


@each_policy
def test_docstrings_say_where_it_comes_from(kind: str, name: str) -> None:
    module = sys.modules[find(kind, name).__module__]
    text = module.__doc__ or ""
    for word in ("Source: ", "Idea: ", "Parameter", "Where we differ: "):
        assert word in text, f"{module.__name__} does not say {word!r}"
    for f in dataclasses.fields(find(kind, name)):
        assert not f.init or f.name in text, f"{module.__name__} does not explain {f.name}"


@each_policy
def test_sources_are_pure(kind: str, name: str) -> None:
    """No clock, chance, input, output or logging by name; import-linter checks what is imported indirectly."""
    banned = {"asyncio", "time", "random", "os", "sys", "logging", "socket", "threading", "torch"}
    module = importlib.import_module(find(kind, name).__module__)
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "open", "input"), f"{module.__name__} does I/O"
        assert not {name.partition(".")[0] for name in names} & banned, module.__name__


def test_unknown_names_are_told_the_known_ones() -> None:
    with pytest.raises(KeyError, match="fcfs"):
        find("order", "fcsf")
