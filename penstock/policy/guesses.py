"""Blocks that replicas are taken to hold, because prompts were sent there, as runs of hashes in a forest.

A guess is a run: the blocks of a prompt from the first that its replica does not have to the last. Runs are found by
their first hash, which stands for all before it, and are shared: where two prompts part, or a replica has told a part
of one, the run is cut in two. So a prompt of thousands of blocks is noted, found and forgotten at once, while what is
told (policy.block_index) is a table of single blocks.

    run     hashes in a row, and the bits of the replicas that are taken to hold all of it
    note    what one call of `add` said of one replica: runs, the deepest first, and until when that is believed

A replica's notes are in the order in which they were said; one that is said again comes last. Runs of the same first
hash may stand side by side: one was cut where another began. Both are looked at.

Work: O(runs along the prompt * log blocks) to add or to find, and a copy of the part that is new.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from msgspec import Struct

from penstock.core.types import BlockHash

NO_RUNS: tuple[Run, ...] = ()


class Run(Struct, eq=False, gc=False):
    """Blocks in a row. `holders`: bits of replicas."""

    hashes: Sequence[BlockHash]
    holders: int = 0

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
    until: float
    runs: list[Run] = []  # each note gets its own


class Owner:
    """A replica's part of it. `bit`: its own; `num`: blocks in its runs."""

    __slots__ = ("bit", "notes", "noted", "num")

    def __init__(self, bit: int) -> None:
        self.bit, self.num = bit, 0
        self.notes: dict[Note, None] = {}  # in order
        self.noted: dict[Run, Note] = {}

    def blocks(self) -> list[BlockHash]:
        """The longest unused first, and ends before what they continue."""
        return [each for note in self.notes for run in note.runs for each in reversed(run.hashes)]


class Guesses:
    """Of several owners, by their bits."""

    def __init__(self) -> None:
        self._runs: dict[BlockHash, list[Run]] = {}
        self._owners: dict[int, Owner] = {}

    def own(self, owner: Owner) -> None:
        """Somebody new."""
        self._owners[owner.bit] = owner

    def at(self, first: BlockHash) -> Sequence[Run]:
        """Those that begin with this block. Read-only."""
        return self._runs.get(first, NO_RUNS)

    def of(self, owner: Owner, hashes: Sequence[BlockHash], at: int) -> tuple[Run | None, int]:
        """The run of this owner that goes furthest along a prompt from place `at` on, and how far."""
        return _furthest(
            [run for run in self.at(hashes[at]) if run.holders & owner.bit], hashes, at
        )

    def add(self, owner: Owner, hashes: Sequence[BlockHash], at: int, note: Note) -> int:
        """The owner is taken to hold what follows from `at` on, as far as one run goes. The place behind it."""
        run, common = self.of(owner, hashes, at)
        if run is None:
            run, common = _furthest(self.at(hashes[at]), hashes, at)
        if run is None:
            if self._go_on(owner, hashes, at, note):
                return len(hashes)
            run, common = Run(hashes[at:]), len(hashes) - at
            self._runs.setdefault(hashes[at], []).append(run)
        elif common < len(run.hashes):
            self._cut(run, common)
        self._take(owner, run)
        run.holders |= owner.bit
        owner.num += common
        owner.noted[run] = note
        owner.notes[note] = None
        note.runs.insert(0, run)
        return at + common

    def _go_on(self, owner: Owner, hashes: Sequence[BlockHash], at: int, note: Note) -> bool:
        """What nobody holds goes into the run before it, if that is this owner's alone: so a talk stays one run."""
        if not note.runs:
            return False
        before = note.runs[0]
        if before.holders != owner.bit or before.hashes[-1] != hashes[at - 1]:
            return False
        before.hashes = (*before.hashes, *hashes[at:])
        owner.num += len(hashes) - at
        return True

    def confirm(self, owner: Owner, fresh: Sequence[BlockHash], told: Set[BlockHash]) -> None:
        """An owner has told of fresh blocks, and has told of all in `told`: what begins with these is certain."""
        for each in filter(self._runs.__contains__, fresh):
            for run in [run for run in self.at(each) if run.holders & owner.bit]:
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
            for run in list(note.runs):
                self._drop(owner, run)

    def keep_most(self, owner: Owner, most: int) -> None:
        """Forget the longest unused beyond so many blocks."""
        while owner.num > most:
            run = next(iter(owner.notes)).runs[0]
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
            note.runs.remove(run)
            if not note.runs:
                del owner.notes[note]

    def _drop(self, owner: Owner, run: Run) -> None:
        self._take(owner, run)
        run.holders &= ~owner.bit
        if not run.holders:
            beside = self._runs[run.hashes[0]]
            beside.remove(run)
            if not beside:
                del self._runs[run.hashes[0]]

    def check(self) -> None:
        """Runs, their holders and their owners' notes say the same."""
        runs = [run for beside in self._runs.values() for run in beside]
        assert all(self._runs[run.hashes[0]].count(run) == 1 for run in runs), "a run is lost"
        for owner in self._owners.values():
            assert {run for run in runs if run.holders & owner.bit} == owner.noted.keys()
            assert owner.num == sum([len(run.hashes) for run in owner.noted])
            told = [(run, note) for note in owner.notes for run in note.runs]
            assert dict(told) == owner.noted and len(told) == len(owner.noted)
        bits = sum(self._owners)
        assert all(run.holders and not run.holders & ~bits for run in runs), "a run is nobody's"

    def _cut(self, run: Run, num: int) -> Run:
        """So many blocks of a run stay in it; the rest, which is given back, is another one with the same holders."""
        rest = Run(run.hashes[num:], run.holders)
        run.hashes = run.hashes[:num]
        self._runs.setdefault(rest.hashes[0], []).append(rest)
        left = run.holders
        while left:
            bit = left & -left
            left ^= bit
            owner = self._owners[bit]
            note = owner.noted[run]
            owner.noted[rest] = note
            note.runs.insert(note.runs.index(run), rest)
        return rest


def _furthest(runs: Sequence[Run], hashes: Sequence[BlockHash], at: int) -> tuple[Run | None, int]:
    best, most = None, 0
    for run in runs:
        common = run.shared(hashes, at)
        if common > most:
            best, most = run, common
    return best, most
