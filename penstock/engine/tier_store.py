"""What host memory and disk hold of cached blocks, by name: numbers only, never the memory itself.

    host    name -> host block
    disk    name -> slot of a file. The longest unused go first
    dirty   those in host memory that are to be written to disk yet, the longest unused first
    clean   those in host memory that need not be, because the disk has them or there is none: the same. They go first

A block may be in both, and on the device as well. Nothing that is being copied is given up: `busy` counts the copies
under way that touch a host block or a slot. A name's contents never change, so no copy is ever out of date.

Dirty blocks go when there is no clean one left, and only for what leaves the device, which would be lost itself;
`take_lost` counts both. What is read from disk, or saved ahead of time, does without.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from penstock.core.messages import NO_CHANGES, Changes
from penstock.core.types import BlockHash
from penstock.engine.block_news import PlaceNews


class Kept(Struct, gc=False):
    """One block, in host memory or on disk. `coming`: number of the filing that reads or writes it there, if any."""

    block: int
    busy: int = 0
    coming: int | None = None


class TierStore:
    """See the module's text."""

    def __init__(self, num_host: int, num_slots: int) -> None:
        self.num_host, self.num_slots = num_host, num_slots
        self.host: dict[BlockHash, Kept] = {}
        self.disk: dict[BlockHash, Kept] = {}
        self.dirty: dict[BlockHash, None] = {}
        self.clean: dict[BlockHash, None] = {}
        self.arriving: set[BlockHash] = set()  # on their way from the device to host memory
        self._free_host = list(range(num_host))  # given from the end, as the ledger empties runs
        self._free_slots = list(range(num_slots))[::-1]  # the first ones first: the file grows
        self.has_disk = num_slots > 0
        self._num_lost = 0
        self._news: tuple[PlaceNews, PlaceNews] | None = None  # of host memory, of the disk

    @property
    def room(self) -> int:
        """Host blocks that can be had without losing anything, but for what is being copied just now."""
        return len(self._free_host) + len(self.clean)

    def take_lost(self) -> int:
        """Blocks that are nowhere behind the device, though the disk takes them, since the last call."""
        lost, self._num_lost = self._num_lost, 0
        return lost

    # ------------------------------------------------------------------ news

    def tell_news(self) -> None:
        """Somebody wants to know what is here."""
        self._news = PlaceNews(), PlaceNews()
        self.restart_news()

    def restart_news(self) -> None:
        """Somebody new listens: all that is here is news."""
        if self._news is not None:
            host, disk = self._news
            host.restart([name for name in self.host if self._is_settled(name)])
            disk.restart([name for name, there in self.disk.items() if there.coming is None])

    def take_news(self) -> tuple[Changes, Changes]:
        """What changed since the last call, in host memory and on disk."""
        if self._news is None:
            return NO_CHANGES, NO_CHANGES
        return self._news[0].take(), self._news[1].take()

    def _is_settled(self, name: BlockHash) -> bool:
        return self.host[name].coming is None and name not in self.arriving

    # ------------------------------------------------------------------ looking up

    def in_host(self, names: Sequence[BlockHash], start: int, limit: int) -> int:
        """How many of names[start:limit] host memory holds in a row, ready to be copied."""
        host, at = self.host, start
        while at < limit:
            kept = host.get(names[at])
            if kept is None or kept.coming is not None:
                break
            at += 1
        return at - start

    def settled(self, names: Sequence[BlockHash], start: int) -> int:
        """How many from names[start] on host memory holds in a row, all of each of them written."""
        at = start
        while at < len(names):
            if names[at] not in self.host or not self._is_settled(names[at]):
                break
            at += 1
        return at - start

    def behind(
        self, names: Sequence[BlockHash], start: int, limit: int
    ) -> tuple[list[BlockHash], set[int]]:
        """From names[start] on: those on disk only, and the filings that read others to host memory just now.

        Up to the first that is in neither. What host memory holds in between needs nothing.
        """
        to_read: list[BlockHash] = []
        coming: set[int] = set()
        for name in names[start:limit]:
            kept = self.host.get(name)
            if kept is not None:
                if kept.coming is not None:
                    coming.add(kept.coming)
                continue
            there = self.disk.get(name)
            if there is None or there.coming is not None:
                break
            to_read.append(name)
        return to_read, coming

    def touch(self, names: Iterable[BlockHash]) -> None:
        """They were used; the last ones count as used last."""
        for name in names:
            for each in (self.host, self.disk):
                kept = each.pop(name, None)
                if kept is not None:
                    each[name] = kept
            for some in (self.dirty, self.clean):
                if name in some:
                    del some[name]
                    some[name] = None

    # ------------------------------------------------------------------ host memory

    def keep(self, name: BlockHash, *, is_ahead: bool = False) -> int | None:
        """A host block for contents that leave the device; None: they are kept already, or there is no room.

        `is_ahead`: they are still there, and nothing is to be lost for them.
        """
        if name in self.host or name in self.disk:
            self.touch((name,))
            return None
        block = self._clean_block()
        if block is None and not is_ahead:
            block = self._dirty_block()
        if block is not None:
            self.host[name] = Kept(block, 1)
            self.arriving.add(name)
        return block

    def kept(self, name: BlockHash) -> None:
        """What leaves the device is in host memory."""
        self.host[name].busy -= 1
        self.arriving.remove(name)
        if self._news is not None:
            self._news[0].came(name)
        (self.dirty if self.has_disk and name not in self.disk else self.clean)[name] = None

    def _clean_block(self) -> int | None:
        """A host block for which nothing is lost."""
        if self._free_host:
            return self._free_host.pop()
        return self._block_of(self.clean)

    def _dirty_block(self) -> int | None:
        self._num_lost += self.has_disk
        return self._block_of(self.dirty)

    def _block_of(self, some: Iterable[BlockHash]) -> int | None:
        for name in some:
            if not self.host[name].busy:
                self._leave_host(name)
                return self._free_host.pop()
        return None

    def _leave_host(self, name: BlockHash, *, was_there: bool = True) -> None:
        if self._news is not None and was_there:
            self._news[0].went(name)
        self._free_host.append(self.host.pop(name).block)
        self.dirty.pop(name, None)
        self.clean.pop(name, None)

    # ------------------------------------------------------------------ disk

    def to_write(self, most: int) -> list[BlockHash]:
        """The dirty ones that have been unused longest."""
        found: list[BlockHash] = []
        for name in self.dirty:
            if len(found) == most:
                break
            if not self.host[name].busy:
                found.append(name)
        return found

    def write(self, filing: int, names: Sequence[BlockHash]) -> list[tuple[int, int]]:
        """Host blocks and the slots that they are written to; fewer than asked for when the disk is busy."""
        pairs: list[tuple[int, int]] = []
        for name in names:
            slot = self._slot()
            if slot is None:
                break
            self.host[name].busy += 1
            self.disk[name] = Kept(slot, 1, filing)
            self.dirty.pop(name, None)
            pairs.append((self.host[name].block, slot))
        return pairs

    def _slot(self) -> int | None:
        if self._free_slots:
            return self._free_slots.pop()
        for name, there in self.disk.items():
            if not there.busy:
                self.leave_disk(name)
                return self._free_slots.pop()
        return None

    def leave_disk(self, name: BlockHash, *, was_there: bool = True) -> None:
        """It does not become dirty again where host memory has it: a small disk would be written for ever."""
        if self._news is not None and was_there:
            self._news[1].went(name)
        self._free_slots.append(self.disk.pop(name).block)

    def written(self, name: BlockHash, is_good: bool) -> None:
        kept, there = self.host[name], self.disk[name]
        kept.busy -= 1
        there.busy, there.coming = there.busy - 1, None
        self.clean[name] = None
        if not is_good:
            self.leave_disk(name, was_there=False)
        elif self._news is not None:
            self._news[1].came(name)

    def read(self, filing: int, names: Sequence[BlockHash]) -> list[tuple[int, int]]:
        """Host blocks and the slots that they are read from; fewer than asked for when there is no room."""
        pairs: list[tuple[int, int]] = []
        for name in names:
            block = self._clean_block()
            if block is None:
                break
            there = self.disk[name]
            there.busy += 1
            self.host[name] = Kept(block, 1, filing)
            pairs.append((block, there.block))
        return pairs

    def was_read(self, name: BlockHash, is_good: bool) -> None:
        kept, there = self.host[name], self.disk[name]
        kept.busy, kept.coming = kept.busy - 1, None
        there.busy -= 1
        if not is_good:
            self._leave_host(name, was_there=False)
            if not there.busy:
                self.leave_disk(name)
            return
        self.clean[name] = None
        if self._news is not None:
            self._news[0].came(name)

    def close_disk(self) -> None:
        """Nothing more is written; what is there can still be read."""
        self.has_disk = False
        there = {name for each in (self.clean, self.dirty) for name in each}
        self.clean = {name: None for name in self.host if name in there}  # as they were used
        self.dirty.clear()

    def restore(self, slots: Iterable[tuple[BlockHash, int]]) -> None:
        """What the disk held when it was opened, the longest unused first."""
        for name, slot in slots:
            self.disk[name] = Kept(slot)
        taken = {there.block for there in self.disk.values()}
        self._free_slots = [slot for slot in self._free_slots if slot not in taken]

    def check(self) -> None:
        """Every host block and every slot is one name's, or free; what is whole in host memory is clean or dirty."""
        for each, free, total in (
            (self.host, self._free_host, self.num_host),
            (self.disk, self._free_slots, self.num_slots),
        ):
            held = [kept.block for kept in each.values()]
            assert sorted([*held, *free]) == list(range(total)), "a block of a tier is lost"
            assert all(kept.busy >= 0 for kept in each.values()), "a copy has ended twice"
        for name in self.dirty:
            assert name in self.host and name not in self.disk, "what is dirty is written already"
        coming = {name for name, there in self.disk.items() if there.coming is not None}
        whole = {name for name in self.host if self._is_settled(name)} - coming
        assert whole == {*self.clean, *self.dirty}, (
            "a block of host memory is neither clean nor dirty"
        )
        assert self.clean.keys().isdisjoint(self.dirty), "a block is clean and dirty"
