"""Configuration: frozen dataclasses filled from TOML; unknown keys are errors at every level.

`build(cls, table)` reads the fields and type hints of `cls`: bool, int, float, str, Path, Literal, `X | None`,
lists and tuples of those, dict[str, X], and nested dataclasses. A field typed `Table` takes any table unread (the
owner resolves it later, e.g. the parameters of a policy). Errors name the place, `fleet[0].policy.order.name`, and
the nearest known key. This is the only module that reads TOML.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar, Union, get_args, get_origin

from penstock.core.errors import BadConfig

T = TypeVar("T")


class Table(dict[str, object]):
    """A table that its owner reads later."""


def load_toml(path: Path) -> dict[str, object]:
    """Parse a TOML file. Raises BadConfig with the file, line and column."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadConfig(f"there is no configuration file {path}") from None
    except OSError as error:
        raise BadConfig(f"cannot read the file {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path} is not valid TOML: {error}") from None


def set_path(table: dict[str, object], assignment: str) -> None:
    """Apply one `a.b=v` (as given to --set). Lists are indexed: `fleet.0.replicas=2`. `v` is TOML or a bare word."""
    name, equals, text = assignment.partition("=")
    if not equals or not name:
        raise BadConfig(f"--set wants NAME=VALUE, got {assignment!r}")
    try:
        value: object = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = name.split(".")
    place: object = table
    for key in parents:
        place = _child(place, key, name)
    if isinstance(place, dict):
        place[last] = value
    elif isinstance(place, list) and last.isdecimal() and int(last) < len(place):
        place[int(last)] = value
    else:
        raise BadConfig(f"--set {name}: there is no such place in the configuration")


def _child(place: object, key: str, name: str) -> object:
    if isinstance(place, dict):
        return place.setdefault(key, {})
    if isinstance(place, list) and key.isdecimal() and int(key) < len(place):
        return place[int(key)]
    raise BadConfig(f"--set {name}: there is no such place in the configuration")


def build(cls: type[T], table: Mapping[str, object], where: str = "") -> T:
    """Make a `cls` from a table. Raises BadConfig naming the first key or value that does not fit."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise BadConfig(_unknown(key, fields, where))
    values = {key: _value(hints[key], value, _join(where, key)) for key, value in table.items()}
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise BadConfig(f"{where or 'the configuration'} lacks the key {missing[0]!r}")
    try:
        return cls(**values)
    except (ValueError, AssertionError) as error:
        raise BadConfig(f"{where or 'the configuration'}: {error}") from None


def _unknown(key: str, fields: Mapping[str, object], where: str) -> str:
    near = difflib.get_close_matches(key, fields, n=1)
    known = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(fields))}"
    return f"unknown key {_join(where, key)!r}; {known}"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _value(hint: object, value: object, where: str) -> object:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _union(get_args(hint), value, where)
    if origin is Literal:
        if value not in get_args(hint):
            allowed = ", ".join(map(repr, get_args(hint)))
            raise BadConfig(f"{where} must be one of {allowed}; got {value!r}")
        return value
    if origin in (list, tuple, Sequence):
        return _sequence(hint, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise BadConfig(f"{where} must be a table; got {value!r}")
        inner = get_args(hint)[1]
        return {
            str(key): _value(inner, item, _join(where, str(key))) for key, item in value.items()
        }
    if isinstance(hint, type):
        return _plain(hint, value, where)
    raise BadConfig(f"{where}: configuration cannot hold {hint!r}")


def _union(choices: Sequence[object], value: object, where: str) -> object:
    if value is None and type(None) in choices:
        return None
    errors = []
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _value(choice, value, where)
        except BadConfig as error:
            errors.append(error)
    raise errors[0]


def _sequence(hint: object, value: object, where: str) -> object:
    if not isinstance(value, (list, tuple)):
        raise BadConfig(f"{where} must be a list; got {value!r}")
    args = get_args(hint)
    items = [_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    return items if get_origin(hint) is list else tuple(items)


def _plain(hint: type, value: object, where: str) -> object:
    if dataclasses.is_dataclass(hint) or hint is Table:
        if not isinstance(value, Mapping):
            raise BadConfig(f"{where} must be a table; got {value!r}")
        return Table(value) if hint is Table else build(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise BadConfig(f"{where} must be {hint.__name__}; got {value!r}")
