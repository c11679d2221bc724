"""The loader: what fits is read, what does not is refused at its place, at every level."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from penstock.core.config import Table, build, load_toml, set_path
from penstock.core.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 16
    kind: Literal["a", "b"] = "a"
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    many: list[Inner] = field(default_factory=list)
    names: tuple[str, ...] = ()
    free: Table = field(default_factory=Table)
    keys: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    is_on: bool = False


def test_a_whole_tree_is_read() -> None:
    table = {
        "name": "x",
        "inner": {"size": 4, "ratio": 1},
        "many": [{"kind": "b"}, {}],
        "names": ["p", "q"],
        "free": {"anything": {"goes": 1}},
        "keys": {"k": "tenant"},
        "path": "a/b",
        "is_on": True,
    }
    read = build(Outer, table)
    assert read.inner == Inner(size=4, ratio=1.0) and isinstance(read.inner.ratio, float)
    assert [one.kind for one in read.many] == ["b", "a"]
    assert read.names == ("p", "q") and read.path == Path("a/b")
    assert read.free == {"anything": {"goes": 1}} and read.keys == {"k": "tenant"}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"name": "x", "nmae": 1}, "unknown key 'nmae'; did you mean 'name'?"),
        ({"name": "x", "inner": {"sise": 1}}, "'inner.sise'; did you mean 'size'?"),
        ({"name": "x", "many": [{}, {"zzz": 1}]}, "'many[1].zzz'"),
        ({"name": "x", "inner": {"size": "4"}}, "inner.size must be int; got '4'"),
        ({"name": "x", "inner": {"size": True}}, "inner.size must be int; got True"),
        ({"name": "x", "inner": {"kind": "c"}}, "inner.kind must be one of 'a', 'b'"),
        ({"name": "x", "inner": 3}, "inner must be a table"),
        ({"name": "x", "names": "p"}, "names must be a list"),
        ({"name": "x", "keys": {"k": 1}}, "keys.k must be str"),
        ({}, "lacks the key 'name'"),
    ],
)
def test_what_does_not_fit_is_named(table: dict[str, object], said: str) -> None:
    with pytest.raises(BadConfig) as caught:
        build(Outer, table)
    assert said in str(caught.value)


def test_one_value_can_be_set_from_outside() -> None:
    table: dict[str, object] = {"fleet": [{"replicas": 1}], "seed": 0}
    set_path(table, "fleet.0.replicas=4")
    set_path(table, "seed=7")
    set_path(table, "log.dir=some/where")
    set_path(table, "fleet.0.policy.batch.max_tokens=512")
    assert table == {
        "fleet": [{"replicas": 4, "policy": {"batch": {"max_tokens": 512}}}],
        "seed": 7,
        "log": {"dir": "some/where"},
    }
    for wrong in ("seed", "=3", "fleet.9.replicas=1", "seed.deeper=1"):
        with pytest.raises(BadConfig):
            set_path(table, wrong)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no configuration file"):
        load_toml(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("a = [1,\n b = 2")
    with pytest.raises(BadConfig, match="broken.toml is not valid TOML.*line 2"):
        load_toml(broken)
