"""A configuration as TOML, with every default and every policy written out: what really runs.

Keys of callers are secrets and are left out. TOML has no null, so what is None is left out too.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from penstock.assemble.config import Config
from penstock.assemble.presets import policy_tables

_BARE = re.compile(r"[\w-]+", re.ASCII)
SECRET = {"api_keys", "api_key"}


def print_config(config: Config) -> str:
    """TOML that reads back as the same configuration (but for API keys)."""
    table = _plain(config)
    assert isinstance(table, dict)
    for written, fleet in zip(table["fleet"], config.fleet, strict=True):
        written["name"] = fleet.name if fleet.remote is not None else fleet.served_name
        written["policy"] = {
            slot: dict(found)
            for slot, found in policy_tables(fleet.policy, fleet.cache.prefix).items()
        }
    return "\n".join(_lines(table, "")).strip() + "\n"


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: _plain(item) for name, item in fields.items() if name not in SECRET}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _lines(table: Mapping[str, object], where: str) -> Iterator[str]:
    """Plain keys first, then tables, then lists of tables, as TOML wants."""
    tables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lists = {key: value for key, value in table.items() if _is_list_of_tables(value)}
    for key, value in table.items():
        if key not in tables and key not in lists and value is not None:
            yield f"{_key(key)} = {_literal(value)}"
    for key, value in tables.items():
        yield f"\n[{where}{_key(key)}]"
        yield from _lines(value, f"{where}{_key(key)}.")
    for key, items in lists.items():
        assert isinstance(items, list)
        for item in items:
            yield f"\n[[{where}{key}]]"
            yield from _lines(item, f"{where}{key}.")


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def _is_list_of_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)
