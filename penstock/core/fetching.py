"""Cached prefixes that a replica fetches from a peer instead of computing them: what is said, and what logs keep of it.

The fleet tells with a request which other replica holds more of its prompt (Hint). The replica that got the request
decides. If it wants them, it and the peer talk through their fleet, and blocks go straight from memory to memory:

    Seek    receiver -> fleet               these blocks of that peer are wanted
    Show    fleet -> owner                  keep them where they are, and say where
    Shown   owner -> fleet -> receiver      so many of them, from the first on, with a checksum each
    Leave   receiver -> fleet -> owner      nobody reads them any more

Either may be lost at any time: then the prefix is computed, as it would have been. Numbers of a seek are the receiver's
own; towards the owner the fleet gives it one of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msgspec import Struct

from penstock.core.types import BlockHash


@dataclass(frozen=True, slots=True)
class Hint:
    """Fleet -> replica, before the request itself: so many blocks of its beginning were said to be with this peer."""

    request: str
    peer: str
    num_blocks: int
    kind: Literal["hint"] = "hint"


@dataclass(frozen=True, slots=True)
class Seek:
    """Replica -> fleet: blocks of these names, which follow each other, are wanted from `peer`; say Shown.

    `before`: the names of those in front of them, from the prompt's beginning on. Blocks are found along a prompt.
    """

    seek: int
    peer: str
    names: tuple[BlockHash, ...]
    before: tuple[BlockHash, ...] = ()
    kind: Literal["seek"] = "seek"


@dataclass(frozen=True, slots=True)
class Show:
    """Fleet -> replica: keep those of these blocks that are here until Leave; say Shown."""

    seek: int
    names: tuple[BlockHash, ...]
    before: tuple[BlockHash, ...] = ()
    kind: Literal["show"] = "show"


@dataclass(frozen=True, slots=True)
class Shown:
    """Replica -> fleet, fleet -> replica: where the first so many of them are, as the transport numbers blocks.

    `sums`: what blocks must have as checksums when they have come (core.ports.Transport). With an `error` there are
    none.
    """

    seek: int
    blocks: tuple[int, ...] = ()
    sums: tuple[int, ...] = ()
    address: str = ""
    error: str | None = None
    kind: Literal["shown"] = "shown"


@dataclass(frozen=True, slots=True)
class Leave:
    """Replica -> fleet, fleet -> replica: the seek is over, and its blocks are not read any more."""

    seek: int
    kind: Literal["leave"] = "leave"


# ---------------------------------------------------------------------------- events


class Hinted(Struct, kw_only=True, frozen=True, gc=False):
    """A replica was told with a request who holds more of its prompt (input)."""

    kind: Literal["hinted"] = "hinted"
    at: float
    who: str
    request: str
    peer: str
    num_blocks: int


class SeekBegun(Struct, kw_only=True, frozen=True, gc=False):
    """A replica asks a peer for blocks; the request waits for them."""

    kind: Literal["seek_begun"] = "seek_begun"
    at: float
    who: str
    seek: int
    request: str
    peer: str
    num_blocks: int


class SeekAnswered(Struct, kw_only=True, frozen=True, gc=False):
    """A peer shows so many of the blocks, or `error` says why none (input)."""

    kind: Literal["seek_answered"] = "seek_answered"
    at: float
    who: str
    seek: int
    num_blocks: int
    error: str | None = None


class SeekLate(Struct, kw_only=True, frozen=True, gc=False):
    """It took too long (input): who waits for the blocks computes them."""

    kind: Literal["seek_late"] = "seek_late"
    at: float
    who: str
    seek: int


class BlocksBrought(Struct, kw_only=True, frozen=True, gc=False):
    """A peer's blocks have been copied and checked, or `error` says why not (input)."""

    kind: Literal["blocks_brought"] = "blocks_brought"
    at: float
    who: str
    seek: int
    num_bytes: int
    error: str | None = None


class Pinned(Struct, kw_only=True, frozen=True, gc=False):
    """A replica was asked for blocks by a peer (input), and keeps `num_blocks` of them; names in hex."""

    kind: Literal["pinned"] = "pinned"
    at: float
    who: str
    seek: int
    names: tuple[str, ...]
    reads_host: bool
    num_blocks: int
    num_host: int
    before: tuple[str, ...] = ()


class Unpinned(Struct, kw_only=True, frozen=True, gc=False):
    """Nobody reads these blocks any more (input)."""

    kind: Literal["unpinned"] = "unpinned"
    at: float
    who: str
    seek: int


FetchEvent = Hinted | SeekBegun | SeekAnswered | SeekLate | BlocksBrought | Pinned | Unpinned
