"""Unused blocks, kept so that those who take many get consecutive ones.

A copy of consecutive blocks costs one start instead of one a block (engine.swap), so jobs should hold few long runs.
Blocks are still given out and taken back one by one if need be; contiguity is tried for and never paid for in memory:

    runs    maximal stretches of unused blocks, found by start and by length. Who gives blocks back merges neighbours
    tails   a job that takes blocks gets a group: what it does not need yet of the run stays set aside for it, so that
            it grows without a gap. A tail is unused memory to everybody else: when no run is left, the longest tail is
            split, and at last single blocks are given, which is plain paging

    take    own tail, then the blocks behind its last one, then the shortest run that holds a group, or the longest

Source: dynamic block groups of FastSwitch, as far as described; own code.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator


class Runs:
    """A set of numbers as maximal runs of consecutive ones."""

    def __init__(self, size: int = 0) -> None:
        self._starts: list[int] = []
        self._lengths: dict[int, int] = {}
        self._by_length: list[tuple[int, int]] = []
        self.num = 0
        if size:
            self._insert(0, size)
            self.num = size

    def __iter__(self) -> Iterator[int]:
        for start in self._starts:
            yield from range(start, start + self._lengths[start])

    def runs(self) -> list[tuple[int, int]]:
        return [(start, self._lengths[start]) for start in self._starts]

    def give(self, start: int, length: int) -> None:
        """Add [start, start + length), of which none is in the set."""
        self.num += length
        place = bisect_left(self._starts, start)
        if place < len(self._starts):
            after = self._starts[place]
            assert after >= start + length, "a block is given back twice"
            if after == start + length:
                length += self._remove(after)
        if place > 0:
            before = self._starts[place - 1]
            end = before + self._lengths[before]
            assert end <= start, "a block is given back twice"
            if end == start:
                length += self._remove(before)
                start = before
        self._insert(start, length)

    def take(self, wanted: int) -> tuple[int, int]:
        """A run of `wanted`, from the shortest that has so many; else all of the longest. The set is not empty."""
        place = bisect_left(self._by_length, (wanted, -1))
        length, start = self._by_length[min(place, len(self._by_length) - 1)]
        taken = min(wanted, length)
        self._cut(start, taken)
        return start, taken

    def take_at(self, start: int, wanted: int) -> int:
        """Up to `wanted` from `start` on; how many there were."""
        place = bisect_right(self._starts, start) - 1
        if place < 0:
            return 0
        first = self._starts[place]
        room = first + self._lengths[first] - start
        if room <= 0:
            return 0
        before, taken = start - first, min(wanted, room)
        if before:
            length = self._remove(first)
            self._insert(first, before)
            self._insert(start, length - before)
        self._cut(start, taken)
        return taken

    def _cut(self, start: int, taken: int) -> None:
        length = self._remove(start)
        if taken < length:
            self._insert(start + taken, length - taken)
        self.num -= taken

    def _insert(self, start: int, length: int) -> None:
        insort(self._starts, start)
        self._lengths[start] = length
        insort(self._by_length, (length, start))

    def _remove(self, start: int) -> int:
        length = self._lengths.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        del self._by_length[bisect_left(self._by_length, (length, start))]
        return length


def stretches(blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Numbers in any order as (start, length) of consecutive ones."""
    start = length = 0
    for block in sorted(blocks):
        if length and block == start + length:
            length += 1
            continue
        if length:
            yield start, length
        start, length = block, 1
    if length:
        yield start, length


class FreeRuns:
    """The unused blocks of one memory. `group`: blocks that are set aside at a time for whoever takes some."""

    def __init__(self, size: int, group: int) -> None:
        assert group >= 1, "a group has at least one block"
        self._group = group
        self._runs = Runs(size)
        self._tails: dict[int, tuple[int, int]] = {}  # job -> (start, length)
        self._num_tails = 0

    def __len__(self) -> int:
        return self._runs.num + self._num_tails

    def __iter__(self) -> Iterator[int]:
        yield from self._runs
        for start, length in self._tails.values():
            yield from range(start, start + length)

    def __iadd__(self, blocks: Iterable[int]) -> FreeRuns:
        for start, length in stretches(blocks):
            self._runs.give(start, length)
        return self

    def take(self, seq: int, need: int, last: int | None) -> list[int]:
        """`need` blocks for a job whose last block is `last`; there are so many."""
        taken: list[int] = []
        while need:
            start, length = self._next_for(seq, need, last)
            taken += range(start, start + length)
            need -= length
            last = start + length - 1
        return taken

    def _next_for(self, seq: int, need: int, last: int | None) -> tuple[int, int]:
        """The next stretch, of at most `need` blocks; what is left of its group becomes the job's tail."""
        tail = self._pop_tail(seq)
        if tail is not None:
            return self._keep_rest(seq, *tail, need)
        group = max(need, self._group)
        if last is not None:
            length = self._runs.take_at(last + 1, group)
            if length:
                return self._keep_rest(seq, last + 1, length, need)
        if self._runs.num:
            return self._keep_rest(seq, *self._runs.take(group), need)
        owner = max(self._tails, key=lambda one: (self._tails[one][1], one))
        found = self._pop_tail(owner)
        assert found is not None
        start, length = found
        given = min(need, max(1, length // 2))
        if given < length:  # the owner goes on with what follows its last block
            self._set_tail(owner, start, length - given)
        return start + length - given, given

    def _keep_rest(self, seq: int, start: int, length: int, need: int) -> tuple[int, int]:
        if length > need:
            self._set_tail(seq, start + need, length - need)
            return start, need
        return start, length

    def _set_tail(self, seq: int, start: int, length: int) -> None:
        self._tails[seq] = start, length
        self._num_tails += length

    def _pop_tail(self, seq: int) -> tuple[int, int] | None:
        tail = self._tails.pop(seq, None)
        if tail is not None:
            self._num_tails -= tail[1]
        return tail

    def leave(self, seq: int) -> None:
        """The job takes no more: its tail is anybody's."""
        tail = self._pop_tail(seq)
        if tail is not None:
            self._runs.give(*tail)
