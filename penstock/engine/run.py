"""Runs: consecutive blocks of one prefix that were named together and have the same holders, kept as one thing.

A prompt of twelve thousand tokens has 750 blocks of 16, and nearly all that ever happens to them happens to all of them
at once. So the ledger keeps lists of them and works on slices. A run is cut when somebody shares only its beginning.

Nobody's runs stand in a ring from the longest unused to the latest. The blocks inside a run count as given back one by
one from its end, so its last block is older in this order than its first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress, count
from operator import ne

from penstock.core.types import BlockHash


def num_alike(one: Sequence[BlockHash], other: Sequence[BlockHash]) -> int:
    """How many of the first hashes are the same in both."""
    return next(compress(count(), map(ne, one, other)), min(len(one), len(other)))


class Run:
    """`hashes` names each of `blocks`, or is empty: nobody knows what they hold. `refs`: how many jobs hold them."""

    __slots__ = ("blocks", "hashes", "refs", "before", "after")
    before: Run  # neighbours in the ring, for runs that stand in it
    after: Run

    def __init__(self, blocks: list[int], hashes: list[BlockHash], refs: int) -> None:
        self.blocks, self.hashes, self.refs = blocks, hashes, refs

    def cut(self, size: int) -> Run:
        """Take the first `size` blocks off; they become a run of their own, which is answered."""
        begin = Run(self.blocks[:size], self.hashes[:size], self.refs)
        del self.blocks[:size], self.hashes[:size]
        return begin

    def trim(self, size: int) -> list[int]:
        """Take the last `size` blocks off and forget their names; the blocks, last first."""
        trimmed = self.blocks[: -size - 1 : -1]
        del self.blocks[-size:], self.hashes[-size:]
        return trimmed


class IdleRuns:
    """The runs that nobody holds, from the longest unused to the latest; `num_blocks` in all of them."""

    def __init__(self) -> None:
        self._ends = Run([], [], 0)
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
    def first(self) -> Run:
        assert self.num_blocks, "no run is idle"
        return self._ends.after

    def blocks(self) -> Iterator[int]:
        for run in self:
            yield from reversed(run.blocks)

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
        del run.before, run.after
        self.num_blocks -= len(run.blocks)

    def trim(self, size: int) -> list[int]:
        """Take the last `size` blocks off the first run, which has more than these."""
        self.num_blocks -= size
        return self.first.trim(size)
