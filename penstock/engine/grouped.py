"""The block ledger for jobs that move: the same accounting, consecutive blocks where possible (engine.free_runs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from penstock.core.types import Job
from penstock.engine.free_runs import FreeRuns
from penstock.engine.ledger import BlockLedger
from penstock.engine.radix import RadixLedger


class GroupedLedger(BlockLedger):
    """`group`: blocks set aside at a time for a job that takes some, as long as nobody else needs them."""

    def __init__(
        self, num_blocks: int, block_size: int = 16, *, has_prefix_cache: bool = True, group: int
    ) -> None:
        super().__init__(num_blocks, block_size, has_prefix_cache=has_prefix_cache)
        self._free_runs = FreeRuns(num_blocks, group)
        self._unused = cast(
            list[int], self._free_runs
        )  # all that is asked of it are +=, len and iteration

    def extend(self, job: Job, upto: int) -> None:
        table = self.tables.setdefault(job.seq, [])
        need = -(-upto // self.block_size) - len(table)
        if need <= 0:
            return
        short = need - len(self._unused)
        if short > 0:
            assert need <= self.free, f"job {job.seq} needs {need} blocks, {self.free} are free"
            self._empty(short)
        table += self._free_runs.take(job.seq, need, table[-1] if table else None)

    def extend_each(self, jobs: Sequence[Job], steps: int) -> None:
        for job in jobs:
            self.extend(job, job.computed + steps)

    def shrink(self, job: Job, upto: int) -> bool:
        if self.held(job) * self.block_size >= upto + self.block_size:
            self._free_runs.leave(job.seq)  # its tail joins what is given back in front of it
        return super().shrink(job, upto)

    def release(self, job: Job, computed: int | None = None) -> int:
        self._free_runs.leave(job.seq)
        return super().release(job, computed)


class GroupedRadixLedger(GroupedLedger, RadixLedger):
    """The same, with a tree of prefixes."""
