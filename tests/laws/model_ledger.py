"""A block ledger that is obviously right and as slow as it likes: the oracle for the real one.

A pool of blocks; each knows its contents (a hash or nothing) and the set of jobs that hold it. A block nobody holds
is free; with contents it stays in the pool until a real booking needs the room, so that its prefix can be found
again. A fork is a deep copy on which nothing is ever thrown out: it only counts, as nobody knows yet whom a real
booking would throw out. Of equal contents the first to be remembered serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from penstock.core.types import BlockHash, Job


@dataclass(eq=False)
class Block:
    contents: BlockHash | None = None
    holders: set[int] = field(default_factory=set)


class ModelLedger:
    """Both the real ledger (`is_fork` False) and its what-if copies; see penstock.core.views.LedgerFork."""

    def __init__(self, total: int, block_size: int) -> None:
        self.total, self.block_size = total, block_size
        self.is_fork = False
        self.tables: dict[int, list[Block]] = {}
        self.remembered: list[Block] = []  # blocks with contents, by the instant they got them
        self.idle: list[Block] = []  # of those, the ones nobody holds, longest unused first

    def fork(self) -> ModelLedger:
        twin = ModelLedger(self.total, self.block_size)
        twin.is_fork = True
        blocks = {id(b): b for b in (*self.remembered, *chain(*self.tables.values()))}
        copies = {key: Block(b.contents, set(b.holders)) for key, b in blocks.items()}
        twin.tables = {seq: [copies[id(b)] for b in table] for seq, table in self.tables.items()}
        twin.remembered = [copies[id(b)] for b in self.remembered]
        twin.idle = [copies[id(b)] for b in self.idle]
        return twin

    @property
    def free(self) -> int:
        held = {id(block) for table in self.tables.values() for block in table}
        return self.total - len(held)

    def held(self, job: Job) -> int:
        return len(self.tables.get(job.seq, ()))

    def found(self, job: Job) -> list[Block]:
        """The cached blocks that a job without any would adopt."""
        if self.held(job):
            return []
        found: list[Block] = []
        for contents in job.hashes[: (job.known - 1) // self.block_size]:
            block = next((b for b in self.remembered if b.contents == contents), None)
            if block is None:
                break
            found.append(block)
        return found

    def cached(self, job: Job) -> int:
        return len(self.found(job)) * self.block_size

    def need(self, job: Job, upto: int) -> int:
        found = self.found(job)
        fresh = -(-upto // self.block_size) - self.held(job) - len(found)
        return sum(not block.holders for block in found) + max(0, fresh)

    def adopt(self, job: Job) -> int:
        found = self.found(job)
        table = self.tables.setdefault(job.seq, [])
        for block in found:
            if block in self.idle:
                self.idle.remove(block)
            block.holders.add(job.seq)
            table.append(block)
        return len(table) * self.block_size

    def reserve(self, job: Job, upto: int) -> bool:
        if self.need(job, upto) > self.free:
            return False
        if not self.held(job):
            self.adopt(job)
        table = self.tables[job.seq]
        while len(table) * self.block_size < upto:
            if not self.is_fork and self.total == self.num_in_pool():
                self.forget(self.idle[0])
            table.append(Block(holders={job.seq}))
        for block, contents in zip(table[: upto // self.block_size], job.hashes, strict=False):
            if block.contents is None:
                block.contents = contents
                self.remembered.append(block)
        return True

    def num_in_pool(self) -> int:
        return len(self.idle) + self.total - self.free

    def forget(self, block: Block) -> None:
        self.remembered.remove(block)
        self.idle.remove(block)

    def release(self, job: Job) -> int:
        """What was never computed is forgotten; the end of the sequence becomes idle before its beginning."""
        before = self.free
        table = self.tables.pop(job.seq, [])
        for place, block in reversed(list(enumerate(table))):
            block.holders.discard(job.seq)
            if block.holders:
                continue
            if block.contents is not None:
                self.idle.append(block)
                if place >= job.computed // self.block_size:
                    self.forget(block)
        return self.free - before

    def freeable(self, job: Job) -> int:
        return sum(block.holders == {job.seq} for block in self.tables.get(job.seq, ()))

    def check(self, jobs: Sequence[Job]) -> None:
        assert 0 <= self.free <= self.total
        assert self.is_fork or self.num_in_pool() <= self.total
        assert set(self.tables) <= {job.seq for job in jobs}
        for seq, table in self.tables.items():
            assert all(seq in block.holders for block in table)
            assert len({id(block) for block in table}) == len(table)
