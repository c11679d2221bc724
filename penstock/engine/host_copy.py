"""A job's blocks in slower memory; see engine.swap."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class HostCopy:
    """Host blocks that hold a job's blocks from number `first` on, valid up to position `upto`."""

    first: int
    upto: int
    blocks: list[int] = field(default_factory=list)
    num_moving: int = 0
    is_dropped: bool = False
