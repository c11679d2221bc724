"""A what-if copy of the block ledger. Booking costs a few additions; nothing is copied until something is given back.

Order matters as it does for real: blocks booked for one job count as registered for the jobs asked about later.
Cached blocks found by a job are promised to it from then on: the replica pins the cached blocks of all admitted jobs
before it takes blocks for anybody, so that what a fork found is still there when the decision is applied.

Policies see this through penstock.core.views.LedgerFork, whose arguments are read-only job views; they are the
ledger's own jobs, which is why the mechanism may read `hashes` here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from penstock.core.types import BlockHash, Job

if TYPE_CHECKING:
    from penstock.core.views import JobView
    from penstock.engine.ledger import BlockLedger


class Fork:
    """See penstock.core.views.LedgerFork for the meaning of each method."""

    __slots__ = (
        "_ledger",
        "block_size",
        "total",
        "free",
        "_held",
        "_refs",
        "_booked",
        "_noted",
        "_pending",
        "_found",
    )

    def __init__(self, ledger: BlockLedger) -> None:
        self._ledger = ledger
        self.block_size = ledger.block_size
        self.total = ledger.total
        self.free = ledger.free
        self._held: dict[int, int] = {}
        self._refs: dict[int, int] = {}
        self._booked: list[tuple[Job, int]] = []
        self._noted = 0  # so many of the bookings have their hashes in _pending
        self._pending: set[BlockHash] = set()
        self._found: dict[int, tuple[list[int], int]] = {}

    def held(self, job: JobView) -> int:
        held = self._held.get(job.seq)
        return len(self._ledger.tables.get(job.seq, ())) if held is None else held

    def cached(self, job: JobView) -> int:
        if self.held(job):
            return 0
        real, pending = self._find(cast(Job, job))
        return (len(real) + pending) * self.block_size

    def _find(self, job: Job) -> tuple[list[int], int]:
        """(blocks here now, blocks that earlier bookings of this fork will have registered)."""
        hashes = job.hashes
        if not hashes:
            return [], 0
        limit = min((job.known - 1) // self.block_size, len(hashes))
        known = self._found.get(job.seq)
        if known is None:
            real = self._ledger.find(hashes, 0, limit)
            known = self._found[job.seq] = real, 0
        position = len(known[0]) + known[1]
        if position < limit and self._booked:
            self._find_more(job, position, limit)
            return self._found[job.seq]
        return known

    def _find_more(self, job: Job, position: int, limit: int) -> None:
        """Go on behind what was found when this job was asked about before."""
        if self._noted < len(self._booked):
            self._note_pending()
        index, hashes = self._ledger.index, job.hashes
        real, pending = self._found[job.seq]
        while position < limit:
            block = index.get(hashes[position])
            if block is not None:
                real.append(block)
            elif hashes[position] in self._pending:
                pending += 1
            else:
                break
            position += 1
        self._found[job.seq] = real, pending

    def _note_pending(self) -> None:
        size = self.block_size
        for job, upto in self._booked[self._noted :]:
            self._pending.update(job.hashes[job.computed // size : upto // size])
        self._noted = len(self._booked)

    def need(self, job: JobView, upto: int) -> int:
        held = self.held(job)
        blocks = -(-upto // self.block_size)
        if held:
            return max(0, blocks - held)
        real, pending = self._find(cast(Job, job))
        if not real:
            return max(0, blocks - pending)
        if self._refs:
            revived = sum([self._count(block) == 0 for block in real])
        else:
            revived = list(map(self._ledger.refs.__getitem__, real)).count(0)
        return revived + max(0, blocks - len(real) - pending)

    def _count(self, block: int) -> int:
        return self._ledger.refs[block] + self._refs.get(block, 0)

    def reserve(self, job: JobView, upto: int) -> bool:
        seq = job.seq
        held = self._held.get(seq)
        if held is None:
            held = len(self._ledger.tables.get(seq, ()))
        if not held:
            return self._start(cast(Job, job), upto)
        need = -(-upto // self.block_size) - held
        if need > 0:
            if need > self.free:
                return False
            self.free -= need
            self._held[seq] = held + need
        if upto // self.block_size > job.computed // self.block_size:  # it will fill a block
            self._booked.append((cast(Job, job), upto))
        return True

    def _start(self, job: Job, upto: int) -> bool:
        need = self.need(job, upto)
        if need > self.free:
            return False
        self.free -= need
        real, _ = self._find(job)
        refs = self._refs
        if refs:
            for block in real:
                refs[block] = refs.get(block, 0) + 1
        else:
            refs.update(dict.fromkeys(real, 1))
        self._held[job.seq] = max(-(-upto // self.block_size), len(real))
        self._booked.append((job, upto))
        return True

    def release(self, job: JobView) -> int:
        table = self._ledger.tables.get(job.seq, [])
        held = self.held(job)
        found = self._found.get(job.seq)
        before = self.free
        if table:
            self._give(table)
            self.free += max(0, held - len(table))  # booked here on top of the real ones
        elif held and found is not None:
            self._give(found[0])
            self.free += max(0, held - len(found[0]) - found[1])
        elif held:
            self.free += held
        self._held[job.seq] = 0
        if any(booked is job for booked, _ in self._booked):
            self._unbook(job.seq)
        return self.free - before

    def _unbook(self, seq: int) -> None:
        """What the job would have filled will not be there: forget it, and what others found on the way."""
        self._booked = [(job, upto) for job, upto in self._booked if job.seq != seq]
        self._pending.clear()
        self._noted = 0
        self._found = {
            other: found for other, found in self._found.items() if self._held.get(other)
        }

    def _give(self, blocks: list[int]) -> None:
        for block in blocks:
            self._refs[block] = self._refs.get(block, 0) - 1
            if self._count(block) == 0:
                self.free += 1

    def freeable(self, job: JobView) -> int:
        table = self._ledger.tables.get(job.seq, [])
        mine = sum(1 for block in table if self._count(block) == 1)
        return mine + max(0, self.held(job) - len(table))
