"""Runs: consecutive blocks of one prefix that were named together and have the same holders, kept as one thing.

A prompt of twelve thousand tokens has 750 blocks of 16, and nearly all that ever happens to them happens to all of them
at once. So the ledger keeps lists of them and works on slices. A run is cut when somebody shares only its beginning.

A run does not copy its names: it points into the list of the job that gave them, which only grows. Hashes are objects
all over the memory, and to touch each of them is what would cost.

Nobody's runs stand in a ring from the longest unused to the latest. The blocks inside a run count as given back one by
one from its end, so its last block is older in this order than its first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress, count
from operator import ne
from typing import Any, Protocol

from penstock.core.types import BlockHash


def num_alike(one: list[BlockHash], other: list[BlockHash]) -> int:
    """How many of the first hashes are the same in both."""
    size = min(len(one), len(other))
    return size if one == other else next(compress(count(), map(ne, one, other)), size)


class IdleItem(Protocol):
    """What a `blocks` policy chooses from; `id` tells its ledger which one."""

    @property
    def id(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...


@dataclass(frozen=True, slots=True)
class IdleBlock:
    """A cached block nobody holds."""

    id: int
    num_blocks: int = 1


Rank = Callable[[Any], tuple[float, ...]]


class Run:
    """Blocks named by names[at], names[at + 1]... (None: nobody knows what they hold), and how many jobs hold them."""

    __slots__ = ("blocks", "names", "at", "refs", "before", "after")
    before: Run  # neighbours in the ring, for runs that stand in it
    after: Run

    def __init__(
        self, blocks: list[int], names: list[BlockHash] | None, at: int, refs: int
    ) -> None:
        self.blocks, self.names, self.at, self.refs = blocks, names, at, refs

    @property
    def first(self) -> BlockHash | None:
        """The name of the first block."""
        return None if self.names is None else self.names[self.at]

    def hashes(self, size: int | None = None) -> list[BlockHash]:
        """The names of the first `size` blocks, or of all of them."""
        end = self.at + (len(self.blocks) if size is None else size)
        return [] if self.names is None else self.names[self.at : end]

    def cut(self, size: int) -> Run:
        """Take the first `size` blocks off; they become a run of their own, which is answered."""
        begin = Run(self.blocks[:size], self.names, self.at, self.refs)
        del self.blocks[:size]
        self.at += size
        return begin

    def keep_own_names(self) -> None:
        """Let go of a list of names that is far longer than this run."""
        if self.names is not None and len(self.names) > 2 * len(self.blocks):
            self.names, self.at = self.hashes(), 0


class IdleRuns:
    """The runs that nobody holds, from the longest unused to the latest; `num_blocks` in all of them."""

    def __init__(self) -> None:
        self._ends = Run([], None, 0, 0)
        self._ends.before = self._ends.after = self._ends
        self.num_blocks = 0

    def __iter__(self) -> Iterator[Run]:
        """The one that was answered last may be cut or taken out meanwhile."""
        run = self._ends.after
        while run is not self._ends:
            after = run.after
            yield run
            run = after

    @property
    def oldest(self) -> Run:
        assert self.num_blocks, "no run is idle"
        return self._ends.after

    def blocks(self) -> Iterator[int]:
        for run in self:
            yield from reversed(run.blocks)

    def named(self, most: int) -> Iterator[tuple[int, BlockHash]]:
        """The first blocks of these, with their names, at most so many."""
        for run in self if most > 0 else ():
            yield from zip(
                run.blocks[: -most - 1 : -1], run.hashes()[: -most - 1 : -1], strict=True
            )
            most -= len(run.blocks)
            if most <= 0:
                return

    def append(self, run: Run) -> None:
        self._insert(run, self._ends.before)
        self.num_blocks += len(run.blocks)

    def put_behind(self, begin: Run, run: Run) -> None:
        """`begin` was cut off `run`, which is idle."""
        self._insert(begin, run)

    def _insert(self, run: Run, before: Run) -> None:
        after = before.after
        run.before, run.after = before, after
        before.after = after.before = run

    def remove(self, run: Run) -> None:
        run.before.after, run.after.before = run.after, run.before
        run.before = run.after = self._ends  # lets go of them
        self.num_blocks -= len(run.blocks)

    def trim(self, run: Run, size: int) -> list[int]:
        """Take the last `size` blocks off `run`, which has more than these; the blocks, last first."""
        trimmed = run.blocks[: -size - 1 : -1]
        del run.blocks[-size:]
        self.num_blocks -= size
        return trimmed
