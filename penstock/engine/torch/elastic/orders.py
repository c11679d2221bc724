"""What the replica's process and a device process say to each other.

On the line for orders, which a thread of the device carries out beside its work: what is to be held, each order
answered by None or by what went wrong. On the line for work: the segments of a layer, answered by nothing, or by what
went wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.engine.torch.elastic.exchange import Form
from penstock.engine.torch.elastic.pages import Place

HEAD = struct.Struct("<iii")  # layer, rows of x, number of segments
SEGMENT = struct.Struct("<iii")  # expert, first row of work, count
Segment = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Map:
    """Be a device: two file descriptors follow, of the arena and of the exchange."""

    page_bytes: int
    form: Form
    threads: int


@dataclass(frozen=True, slots=True)
class Peer:
    """An arena to copy from: a file descriptor follows.."""

    device: int


@dataclass(frozen=True, slots=True)
class Stock:
    """Have these experts ready: `kept` are in these pages, `copied` in (device, page) of a peer, `read` on disk."""

    kept: tuple[tuple[Place, int], ...] = ()
    copied: tuple[tuple[Place, int, int, int], ...] = ()  # place, here, device, there
    read: tuple[tuple[Place, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Drop:
    """These experts are not needed any more, nor are their pages."""

    pages: tuple[tuple[Place, int], ...]


@dataclass(frozen=True, slots=True)
class Threads:
    """Compute with so many."""

    count: int


@dataclass(frozen=True, slots=True)
class Rest:
    """Be a standby again: no experts, no memory of theirs."""


Order = Map | Peer | Stock | Drop | Threads | Rest


def told(layer: int, num_rows: int, segments: Sequence[Segment]) -> bytes:
    parts = [HEAD.pack(layer, num_rows, len(segments))]
    parts += [SEGMENT.pack(*one) for one in segments]
    return b"".join(parts)


def heard(message: bytes) -> tuple[int, int, list[Segment]]:
    layer, num_rows, count = HEAD.unpack_from(message)
    at = HEAD.size
    segments = [SEGMENT.unpack_from(message, at + each * SEGMENT.size) for each in range(count)]
    return layer, num_rows, segments
