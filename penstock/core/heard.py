"""Events of what a fleet hears from its replicas beside reports. They are read from core.events, which lists them."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

Told = tuple[tuple[str, ...], tuple[str, ...]]


class BlocksTold(Struct, kw_only=True, gc=False):
    """A fleet heard which blocks a replica holds since the last time, and which no more (input). Hex hashes.

    `host`, `disk`: the same two lists of the memory behind the device's.
    """

    kind: Literal["blocks_told"] = "blocks_told"
    at: float
    who: str
    replica: str
    stored: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    host: Told | UnsetType = UNSET
    disk: Told | UnsetType = UNSET


class Begun(Struct, kw_only=True, gc=False):
    """A fleet heard the first of a request from a replica whose reports say nothing of numbers (input)."""

    kind: Literal["begun"] = "begun"
    at: float
    who: str
    request: str
    replica: str
