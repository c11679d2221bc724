"""Schema versions: whatever is written or sent says which major version it speaks, and others are refused."""

from __future__ import annotations

from penstock.core.errors import SchemaMismatch
from penstock.core.types import SCHEMA


def check_schema(what: str, version: int) -> None:
    """Raise SchemaMismatch unless `version` is the major version this Penstock speaks."""
    if version != SCHEMA:
        raise SchemaMismatch(
            f"{what} has schema version {version}; this Penstock reads version {SCHEMA}",
            hint="read it with the Penstock release that wrote it, or write it again with this one",
        )
