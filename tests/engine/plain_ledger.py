"""The block ledger as its module text states it, one block after the other: the oracle for the one that keeps runs.

Which block is taken, found, kept and forgotten is all determined, so the two can be compared to the last block id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.core.types import BlockHash, Job


class PlainLedger:
    def __init__(self, total: int, block_size: int, *, has_prefix_cache: bool = True) -> None:
        self.total, self.block_size, self.has_prefix_cache = total, block_size, has_prefix_cache
        self.tables: dict[int, list[int]] = {}
        self.registered: dict[int, int] = {}
        self.names: dict[int, BlockHash] = {}  # in the order in which they were given
        self.unused = list(reversed(range(total)))
        self.idle: list[int] = []  # longest unused first
        self.choose_idle: Callable[[int], Sequence[int]] | None = None

    @property
    def free(self) -> int:
        return len(self.unused) + len(self.idle)

    def is_held(self, block: int) -> bool:
        return any(block in table for table in self.tables.values())

    def serving(self, contents: BlockHash) -> int | None:
        return next((block for block, name in self.names.items() if name == contents), None)

    def adopt(self, job: Job) -> int:
        table = self.tables.setdefault(job.seq, [])
        for contents in job.hashes[len(table) : (job.known - 1) // self.block_size]:
            block = self.serving(contents)
            if block is None:
                break
            if block in self.idle:
                self.idle.remove(block)
            table.append(block)
        self.registered[job.seq] = len(table) if job.hashes else 0
        return len(table) * self.block_size

    def extend(self, job: Job, upto: int) -> None:
        table = self.tables.setdefault(job.seq, [])
        need = -(-upto // self.block_size) - len(table)
        short = need - len(self.unused)
        if short > 0:
            choose = self.choose_idle or (lambda num: self.idle[:num])
            for block in list(choose(short)):
                self.idle.remove(block)
                del self.names[block]
                self.unused.append(block)
        for _ in range(need):
            table.append(self.unused.pop())

    def register(self, job: Job, upto: int) -> None:
        table, done = self.tables[job.seq], self.registered[job.seq]
        full = min(upto // self.block_size, len(job.hashes))
        for place in range(done, full):
            self.names[table[place]] = job.hashes[place]
        self.registered[job.seq] = max(done, full)

    def release(self, job: Job, computed: int) -> int:
        before = self.free
        table = self.tables.pop(job.seq, [])
        self.registered.pop(job.seq, None)
        for place in reversed(range(len(table))):
            block = table[place]
            if self.is_held(block):
                continue
            is_computed = place < computed // self.block_size
            if block in self.names and is_computed and self.has_prefix_cache:
                self.idle.append(block)
            else:
                self.names.pop(block, None)
                self.unused.append(block)
        return self.free - before

    def disown(self, job: Job, start: int) -> set[int]:
        blocks = self.tables[job.seq][start // self.block_size :]
        for block in blocks:
            self.names.pop(block, None)
        return set(blocks)

    def reset_cache(self) -> int:
        count = len(self.idle)
        for block in self.idle:
            del self.names[block]
        self.unused += self.idle
        self.idle = []
        return count
