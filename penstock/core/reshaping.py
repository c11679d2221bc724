"""A replica that gets more or fewer devices for the experts of its model while it serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from msgspec import Struct

Placing = Literal["elastic-moe", "eplb"]  # the move policy that says where experts go


@dataclass(frozen=True, slots=True)
class NewShape:
    """What became of it: devices before and now, experts copied from peers and read from disk, bytes of both."""

    was: int
    devices: int
    num_copied: int = 0
    num_read: int = 0
    num_bytes: int = 0


class Reshaper(Protocol):
    """An executor's side of it."""

    async def reshape(self, devices: int, placing: Placing) -> NewShape:
        """Return when it serves so. Raises PenstockError, and nothing has changed."""
        ...


class Reshaped(Struct, kw_only=True, frozen=True, gc=False):
    """A replica has other devices, or its experts lie elsewhere; with an `error` it is as it was."""

    kind: Literal["reshaped"] = "reshaped"
    at: float
    who: str
    replica: str
    was: int
    devices: int
    took_s: float
    placing: str = "elastic-moe"
    num_copied: int = 0
    num_read: int = 0
    num_bytes: int = 0
    error: str = ""
