"""Blocks that replicas are taken to hold, because prompts were sent there, as runs of hashes in a forest.

A guess is a run: the blocks of a prompt from the first that its replica does not have to the last. Runs are found by
their first hash, which stands for all before it, and are shared: where two prompts part, or a replica has told a part
of one, the run is cut in two. So a prompt of thousands of blocks is noted, found and forgotten at once, while what is
told (policy.block_index) is a table of single blocks.

    run     hashes in a row, and the bits of the replicas that are taken to hold all of it
    note    what one call of `add` said of one replica: runs, the deepest first, and until when that is believed

A replica's notes are in the order in which they were said; one that is said again comes last. Runs of the same first
hash may stand side by side: one was cut where another began. Both are looked at.

Work: O(runs along the prompt * log blocks) to add or to find, and a copy of the part that is new. A prompt leaves one
tuple behind and nothing else that a collector of garbage would look at, as there are many.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from msgspec import Struct

from penstock.core.types import BlockHash

ANYBODY = -1  # all bits


class Run(Struct, eq=False, gc=False):
    """Blocks in a row. `holders`: bits of replicas; `beside`: another one of the same first hash."""

    hashes: Sequence[BlockHash]
    holders: int = 0
    beside: Run | None = None

    def shared(self, hashes: Sequence[BlockHash], at: int) -> int:
        """How many of its blocks are those of a prompt from place `at` on. Its first is."""
        own = self.hashes
        low, high = 1, min(len(own), len(hashes) - at)
        if own[high - 1] == hashes[at + high - 1]:
            return high
        high -= 1
        while low < high:
            middle = (low + high) // 2
            if own[middle] == hashes[at + middle]:
                low = middle + 1
            else:
                high = middle
        return low


class Note(Struct, eq=False, gc=False):
    """`more`: those behind the first; nearly always there is one only."""

    until: float
    first: Run | None = None
    more: tuple[Run, ...] = ()

    def runs(self) -> list[Run]:
        """The deepest first."""
        return [] if self.first is None else [self.first, *self.more]

    def keep(self, runs: list[Run]) -> None:
        self.first, self.more = (runs[0], tuple(runs[1:])) if runs else (None, ())


class Owner:
    """A replica's part of it. `bit`: its own; `num`: blocks in its runs."""

    __slots__ = ("bit", "notes", "noted", "num")

    def __init__(self, bit: int) -> None:
        self.bit, self.num = bit, 0
        self.notes: dict[Note, None] = {}  # in order
        self.noted: dict[Run, Note] = {}

    def blocks(self) -> list[BlockHash]:
        """The longest unused first, and ends before what they continue."""
        return [each for note in self.notes for run in note.runs() for each in reversed(run.hashes)]


class Guesses:
    """Of several owners, by their bits."""

    def __init__(self) -> None:
        self._runs: dict[BlockHash, Run] = {}
        self._owners: dict[int, Owner] = {}

    def own(self, owner: Owner) -> None:
        """Somebody new."""
        self._owners[owner.bit] = owner

    def at(self, first: BlockHash) -> Run | None:
        """One that begins with this block; the others are `beside` it."""
        return self._runs.get(first)

    def of(self, bits: int, hashes: Sequence[BlockHash], at: int) -> tuple[Run | None, int]:
        """The run that goes furthest along a prompt from place `at` on, of those that any of these hold; how far."""
        best, most, run = None, 0, self._runs.get(hashes[at])
        while run is not None:
            if run.holders & bits:
                shared = run.shared(hashes, at)
                if shared > most:
                    best, most = run, shared
            run = run.beside
        return best, most

    def add(self, owner: Owner, hashes: Sequence[BlockHash], at: int, note: Note) -> int:
        """The owner is taken to hold what follows from `at` on, as far as one run goes. The place behind it."""
        run, shared = self.of(owner.bit, hashes, at)
        if run is None:
            run, shared = self.of(ANYBODY, hashes, at)
        if run is None:
            if self._go_on(owner, hashes, at, note):
                return len(hashes)
            run, shared = Run(hashes[at:]), len(hashes) - at
            self._put(run)
        elif shared < len(run.hashes):
            self._cut(run, shared)
        self._take(owner, run)
        run.holders |= owner.bit
        owner.num += shared
        owner.noted[run] = note
        owner.notes[note] = None
        note.keep([run, *note.runs()])
        return at + shared

    def _go_on(self, owner: Owner, hashes: Sequence[BlockHash], at: int, note: Note) -> bool:
        """What nobody holds goes into the run before it, if that is this owner's alone: so a talk stays one run."""
        before = note.first
        if before is None or before.holders != owner.bit or before.hashes[-1] != hashes[at - 1]:
            return False
        before.hashes = (*before.hashes, *hashes[at:])
        owner.num += len(hashes) - at
        return True

    def confirm(self, owner: Owner, fresh: Sequence[BlockHash], told: Set[BlockHash]) -> None:
        """An owner has told of fresh blocks, and has told of all in `told`: what begins with these is certain."""
        for each in filter(self._runs.__contains__, fresh):
            for run in [run for run in self._beside(each) if run.holders & owner.bit]:
                num = next((at for at, one in enumerate(run.hashes) if one not in told), None)
                if num == 0:
                    continue  # it has gone again
                if num is not None:
                    self._cut(run, num)
                self._drop(owner, run)

    def expire(self, owner: Owner, now: float) -> None:
        """Forget what was to be believed until now."""
        while owner.notes:
            note = next(iter(owner.notes))
            if note.until > now:
                break
            for run in note.runs():
                self._drop(owner, run)

    def keep_most(self, owner: Owner, most: int) -> None:
        """Forget the longest unused beyond so many blocks."""
        while owner.num > most:
            run = next(iter(owner.notes)).first
            assert run is not None, "a note of nothing"
            over = owner.num - most
            if len(run.hashes) > over:
                run = self._cut(run, len(run.hashes) - over)
            self._drop(owner, run)

    def forget(self, owner: Owner) -> None:
        """All of an owner's."""
        for run in list(owner.noted):
            self._drop(owner, run)
        del self._owners[owner.bit]

    def _take(self, owner: Owner, run: Run) -> None:
        """Out of the note that it was in."""
        note = owner.noted.pop(run, None)
        if note is not None:
            owner.num -= len(run.hashes)
            note.keep([each for each in note.runs() if each is not run])
            if note.first is None:
                del owner.notes[note]

    def _drop(self, owner: Owner, run: Run) -> None:
        self._take(owner, run)
        run.holders &= ~owner.bit
        if not run.holders:
            left = [each for each in self._beside(run.hashes[0]) if each is not run]
            del self._runs[run.hashes[0]]
            for each in left:
                self._put(each)

    def _put(self, run: Run) -> None:
        """Where it can be found."""
        run.beside = self._runs.get(run.hashes[0])
        self._runs[run.hashes[0]] = run

    def _beside(self, first: BlockHash) -> list[Run]:
        """All that begin with a block."""
        found, run = [], self._runs.get(first)
        while run is not None:
            found.append(run)
            run = run.beside
        return found

    def check(self) -> None:
        """Runs, their holders and their owners' notes say the same."""
        runs = [run for first in self._runs for run in self._beside(first)]
        assert all(run in self._beside(run.hashes[0]) for run in runs), "a run is lost"
        for owner in self._owners.values():
            assert {run for run in runs if run.holders & owner.bit} == owner.noted.keys()
            assert owner.num == sum([len(run.hashes) for run in owner.noted])
            told = [(run, note) for note in owner.notes for run in note.runs()]
            assert dict(told) == owner.noted and len(told) == len(owner.noted)
        bits = sum(self._owners)
        assert all(run.holders and not run.holders & ~bits for run in runs), "a run is nobody's"

    def _cut(self, run: Run, num: int) -> Run:
        """So many blocks of a run stay in it; the rest, which is given back, is another one with the same holders."""
        rest = Run(run.hashes[num:], run.holders)
        run.hashes = run.hashes[:num]
        self._put(rest)
        left = run.holders
        while left:
            bit = left & -left
            left ^= bit
            owner = self._owners[bit]
            note = owner.noted[run]
            owner.noted[rest] = note
            runs = note.runs()
            runs.insert(runs.index(run), rest)
            note.keep(runs)
        return rest
