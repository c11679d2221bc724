"""Typed access to a parsed config.json, with errors that name the file and the key."""

from __future__ import annotations

from collections.abc import Mapping

from penstock.core.errors import BadModel

Config = Mapping[str, object]


class Reader:
    """See the module's text. `where` names the file."""

    def __init__(self, config: Config, where: str) -> None:
        self.config, self.where = config, where

    def over(self, **silent: object) -> Reader:
        """The same with other values for keys that the file does not have."""
        return Reader({**silent, **self.config}, self.where)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadModel(f"{self.where}: {key} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        return number(self.config, key, default, self.where)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.config.get(key)
        return default if value is None else bool(value)


def number(table: Config, key: str, default: float | None, where: str) -> float:
    value = table.get(key)
    if value is None:
        value = default
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise BadModel(f"{where}: {key} must be a number, got {value!r}")
    return float(value)
