"""The block ledger: who holds which block of KV memory, and which unused blocks still hold a known prefix.

A block is in one of three states:

    held      one or more jobs hold it (`refs` > 0); hashed once all its positions are planned
    idle      nobody holds it, its contents are still known by hash: a prefix cache hit revives it
    unused    contents unknown or worthless

Taking a block uses unused ones first (latest freed first), then asks the `blocks` policy which idle ones lose
their contents; with LRU that is vLLM v1's order. A job's blocks are given back tail first, so that the end of a
sequence is forgotten before its beginning. A full block is registered under its hash when the step that computes
its last position is planned: a later chunk of the same step may already share it, because every layer writes all keys
and values of a step before it reads any (engine.torch.ports). Two blocks may carry the same hash (two jobs computed
the same prompt at once); both are remembered, the first serves.

Without prefix caching a block is forgotten as soon as nobody holds it; sharing between living jobs (the answers of
one request) works all the same.

Source: vLLM v1 block pool and KV cache manager semantics (v1/core/block_pool, kv_cache_manager), own code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from penstock.core.types import BlockHash, Job
from penstock.engine.fork import Fork

ChooseIdle = Callable[[int], Sequence[int]]


class BlockLedger:
    """Accounting of `num_blocks` blocks of `block_size` positions. Holds numbers only, never the memory itself."""

    def __init__(
        self, num_blocks: int, block_size: int = 16, *, has_prefix_cache: bool = True
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"{num_blocks} blocks of {block_size} positions: both must be positive"
            )
        self.total = num_blocks
        self.block_size = block_size
        self.has_prefix_cache = has_prefix_cache
        self.refs = [0] * num_blocks
        self.tables: dict[int, list[int]] = {}
        self.index: dict[BlockHash, int] = {}
        self._twins: dict[BlockHash, list[int]] = {}
        self._hash: list[BlockHash | None] = [None] * num_blocks
        self._unused = list(range(num_blocks - 1, -1, -1))
        # From the longest unused to the latest. No plain dict: one that loses its oldest entries is slow to begin.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.registered: dict[int, int] = {}
        self.choose_idle: ChooseIdle | None = None  # None = the longest unused

    @property
    def free(self) -> int:
        return len(self._unused) + len(self._idle)

    def fork(self) -> Fork:
        """A what-if copy for policies: see penstock.core.views.LedgerFork."""
        return Fork(self)

    def held(self, job: Job) -> int:
        return len(self.tables.get(job.seq, ()))

    def idle_blocks(self) -> Iterator[int]:
        """Idle blocks, from the longest unused to the latest."""
        return iter(self._idle)

    def find(self, hashes: Sequence[BlockHash], start: int, limit: int) -> list[int]:
        """Blocks whose contents are the hashes[start:limit], up to the first that is not here."""
        found: list[int] = []
        for block in map(self.index.get, hashes[start:limit]):
            if block is None:
                break
            found.append(block)
        return found

    def adopt(self, job: Job) -> int:
        """Give `job` the cached blocks that continue what it holds; the positions it holds then.

        At least one position is left to compute, so that there is something to sample from.
        """
        table = self.tables.setdefault(job.seq, [])
        if job.hashes:
            limit, refs, idle = (job.known - 1) // self.block_size, self.refs, self._idle
            found = self.find(job.hashes, len(table), limit)
            for block in found:
                count = refs[block]
                refs[block] = count + 1
                if not count:
                    del idle[block]
            table += found
        self.registered[job.seq] = max(self.registered.get(job.seq, 0), len(table))
        return len(table) * self.block_size

    def extend(self, job: Job, upto: int) -> None:
        """Make `job` hold positions [0, upto). The caller knows that it fits."""
        table = self.tables.setdefault(job.seq, [])
        need = -(-upto // self.block_size) - len(table)
        if need <= 0:
            return
        short = need - len(self._unused)
        if short > 0:
            assert need <= self.free, f"job {job.seq} needs {need} blocks, {self.free} are free"
            self._empty(short)
        taken = self._unused[: -need - 1 : -1]
        del self._unused[-need:]
        refs = self.refs
        for block in taken:
            refs[block] = 1
        table += taken

    def extend_each(self, jobs: Sequence[Job], steps: int) -> None:
        """Make every job hold `steps` positions more than it has computed, in order."""
        tables, unused, refs, size = self.tables, self._unused, self.refs, self.block_size
        for job in jobs:
            upto, table = job.computed + steps, tables[job.seq]
            if upto <= len(table) * size:
                continue
            if upto <= (len(table) + 1) * size and unused:
                block = unused.pop()
                refs[block] = 1
                table.append(block)
            else:
                self.extend(job, upto)

    def _empty(self, short: int) -> None:
        """Turn idle blocks into unused ones."""
        idle, unused = self._idle, self._unused
        if self.choose_idle is not None:
            for block in self.choose_idle(short):
                del idle[block]
                self._forget(block)
                unused.append(block)
            return
        hashes, pop = self._hash, idle.popitem
        blocks = [pop(False)[0] for _ in range(short)]
        if self._twins:
            for block in blocks:
                self._forget(block)
        else:
            for block in blocks:
                del self.index[hashes[block]]  # type: ignore[arg-type]  # idle blocks are hashed
                hashes[block] = None
        unused += blocks

    def register(self, job: Job, upto: int) -> None:
        """Remember the full blocks of positions [0, upto) under the job's hashes."""
        done = self.registered.get(job.seq, 0)
        full = min(upto // self.block_size, len(job.hashes))
        if full <= done:
            return
        self.registered[job.seq] = full
        hashes, index, before = self._hash, self.index, len(self.index)
        blocks, fresh = self.tables[job.seq][done:full], job.hashes[done:full]
        if index.keys().isdisjoint(fresh):
            # Nothing of it is known, so none of these blocks has a name yet.
            index.update(zip(fresh, blocks, strict=True))
            if len(index) == before + len(fresh):
                for block, known in zip(blocks, fresh, strict=True):
                    hashes[block] = known
                return
            for known in set(fresh):  # a prompt that names two of its own blocks alike
                del index[known]
        for block, known in zip(blocks, fresh, strict=True):
            if hashes[block] is None:
                hashes[block] = known
                if index.setdefault(known, block) != block:
                    self._twins.setdefault(known, []).append(block)

    def release(self, job: Job, computed: int | None = None) -> int:
        """Take all blocks from `job`; how many became free. Blocks beyond `computed` positions are forgotten."""
        table = self.tables.pop(job.seq, [])
        if not self.registered.pop(job.seq, 0):  # nothing shared, nothing known by hash
            refs = self.refs
            for block in table:
                refs[block] = 0
            table.reverse()
            self._unused += table
            return len(table)
        trusted = len(table) if computed is None else computed // self.block_size
        refs, hashes, idle, freed = self.refs, self._hash, self._idle, 0
        for position in range(len(table) - 1, -1, -1):
            block = table[position]
            count = refs[block] = refs[block] - 1
            if count:
                continue
            freed += 1
            if position < trusted and self.has_prefix_cache and hashes[block] is not None:
                idle[block] = None
            else:
                self._forget(block)
                self._unused.append(block)
        return freed

    def disown(self, job: Job, start: int) -> set[int]:
        """Forget the hashes of what `job` holds from position `start` on: nobody wrote it. The blocks stay held."""
        blocks = self.tables[job.seq][start // self.block_size :]
        for block in blocks:
            self._forget(block)
        return set(blocks)

    def _forget(self, block: int) -> None:
        known = self._hash[block]
        if known is None:
            return
        self._hash[block] = None
        twins = self._twins.get(known)
        if self.index[known] != block:
            assert twins is not None
            twins.remove(block)
        elif twins:
            self.index[known] = twins.pop(0)
        else:
            del self.index[known]
        if twins is not None and not twins:
            del self._twins[known]

    def reset_cache(self) -> int:
        """Forget every idle block; how many there were."""
        count = len(self._idle)
        for block in list(self._idle):
            self._forget(block)
            self._unused.append(block)
        self._idle.clear()
        return count

    def check(self) -> None:
        """Recompute the invariants: every block in one state, refs = table entries, index = hashes."""
        refs = [0] * self.total
        for table in self.tables.values():
            assert len(set(table)) == len(table), "a job holds a block twice"
            for block in table:
                refs[block] += 1
        assert refs == self.refs, "reference counts differ from the block tables"
        free = [*self._unused, *self._idle]
        assert len(set(free)) == len(free), "a block is free twice"
        assert all(self.refs[block] == 0 for block in free), "a held block is free"
        held = sum(1 for count in self.refs if count)
        assert held + len(free) == self.total, f"{self.total - held - len(free)} blocks are lost"
        assert all(self._hash[block] is None for block in self._unused), "an unused block is hashed"
        hashed = {block for block, known in enumerate(self._hash) if known is not None}
        indexed = set(self.index.values()) | {b for twins in self._twins.values() for b in twins}
        assert hashed == indexed, "hashes and index differ"
