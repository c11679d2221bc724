"""The block ledger: who holds which block of KV memory, and which unused blocks still hold a known prefix.

A block is in one of three states:

    held      one or more jobs hold it (`refs` > 0); hashed once all its positions are planned
    idle      nobody holds it, its contents are still known by hash: a prefix cache hit revives it
    unused    contents unknown or worthless

Taking a block uses unused ones first (latest freed first), then asks the `blocks` policy which idle ones lose their
contents; with LRU that is vLLM v1's order. A job's blocks are given back tail first, so that the end of a sequence is
forgotten before its beginning. A full block is registered when the step that computes its last position is planned: a
later chunk of the step may already share it, as every layer writes all keys and values of a step before it reads any.
Two blocks may carry the same hash (two jobs computed one prompt at once); both are remembered, the first serves.
Without prefix caching a block is forgotten as soon as nobody holds it; the answers of one request share all the same.

All of this is true block by block, and kept run by run (engine.run), so that long prompts cost what short ones do:

    a job's named blocks are the blocks of whole runs, one behind the other; `starts` finds a run by its first block
    what behind them the job holds is its own and has no name
    `index` finds a run by its first hash. That is enough because a hash names a block and all before it
        (core.prompt): who has a block inside a run in common with it has what is before it in common too
    who leaves last leaves from the end, and what is emptied first is an end. So while the oldest are emptied, whatever
        follows a block that is not known is not known either; `_is_whole` says that this is so
    a run grows at its end while one job alone holds it, and nobody else knows its contents
    copies of the same contents (twins) have their borders at the same places; one is in the index

Where hashes do not name prefixes, which no prompt does, less may be found than is there. engine.radix is another store.
Source: vLLM v1 block pool and KV cache manager semantics (v1/core/block_pool, kv_cache_manager), own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, compress, count, groupby

from penstock.core.types import BlockHash, Job
from penstock.engine.block_news import SILENCE, NewsDesk, Silence
from penstock.engine.fork import Fork
from penstock.engine.host_copy import HostCopy
from penstock.engine.run import IdleBlock, IdleItem, IdleRuns, Rank, Run, num_alike
from penstock.engine.run_check import check_names, check_runs, check_tables, holders_of

ChooseIdle = Callable[[int], Sequence[int]]


class BlockLedger:
    """Accounting of `num_blocks` blocks of `block_size` positions. Holds numbers only, never the memory itself."""

    def __init__(
        self, num_blocks: int, block_size: int = 16, *, has_prefix_cache: bool = True
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size}: both must be positive")
        self.total = num_blocks
        self.block_size = block_size
        self.has_prefix_cache = has_prefix_cache
        self.tables: dict[int, list[int]] = {}
        self.registered: dict[int, int] = {}  # so many blocks of each table are in runs
        self.index: dict[BlockHash, Run] = {}
        self._starts: dict[int, Run] = {}
        self._last: dict[int, Run] = {}  # the run that ends a job's registered blocks
        self._twins: dict[BlockHash, list[Run]] = {}  # those that do not serve, oldest first
        self._is_whole = True
        self.names_ahead = True  # else blocks get their names when their step has ended
        self._unused = list(range(num_blocks - 1, -1, -1))
        self._idle = IdleRuns()
        self.choose_idle: ChooseIdle | None = None  # None = the longest unused
        self.news: NewsDesk | Silence = SILENCE
        self.copies: dict[int, HostCopy] = {}  # by job; see engine.swap
        self.on_emptied: Callable[[Run, int], None] | None = None  # see engine.tiers

    @property
    def free(self) -> int:
        return len(self._unused) + self._idle.num_blocks

    def fork(self) -> Fork:
        """A what-if copy for policies: see penstock.core.views.LedgerFork."""
        return Fork(self)

    def held(self, job: Job) -> int:
        return len(self.tables.get(job.seq, ()))

    def runs(self, seq: int) -> list[Run]:
        """The runs of a job's registered blocks, in order."""
        return self._runs(self.tables.get(seq, []), self.registered.get(seq, 0))

    def _runs(self, table: list[int], named: int) -> list[Run]:
        runs, at = [], 0
        while at < named:
            runs.append(self._starts[table[at]])
            at += len(runs[-1].blocks)
        return runs

    def idle_blocks(self) -> Iterator[int]:
        return self._idle.blocks()  # from the longest unused to the latest

    def next_to_go(self, reserve: int) -> Iterator[tuple[int, BlockHash]]:
        return self._idle.named(reserve - len(self._unused))  # idle ones up to so many free places

    def idle_items(self) -> Iterator[IdleItem]:
        """The same as the `blocks` policy sees them."""
        return map(IdleBlock, self.idle_blocks())

    def keeps_order(self, rank: Rank) -> bool:
        """Whether this store from now on finds by itself what a `blocks` policy that ranks would choose."""
        return False

    def find(self, hashes: list[BlockHash], start: int, limit: int) -> dict[Run, int]:
        """Where hashes[start:limit] are, up to the first that is not here: runs in order, so many blocks of each."""
        found: dict[Run, int] = {}
        limit = min(limit, len(hashes))
        while start < limit:
            run = self.index.get(hashes[start])
            if run is None or run in found:
                break
            most = min(len(run.blocks), limit - start)
            found[run] = num_alike(run.hashes(most), hashes[start : start + most])
            start += found[run]
        return found

    def adopt(self, job: Job) -> int:
        """Give `job` the cached blocks that continue what it holds; the positions it holds then.

        At least one position is left to compute, so that there is something to sample from.
        """
        seq = job.seq
        table, named = self.tables.setdefault(seq, []), self.registered.setdefault(seq, 0)
        if job.hashes:
            assert len(table) == named, (
                f"job {seq} has blocks of its own, and looks for cached ones"
            )
            limit = (job.known - 1) // self.block_size
            for run, size in self.find(job.hashes, named, limit).items():
                shared = run if size == len(run.blocks) else self._split(run, size)
                if not shared.refs:
                    self._idle.remove(shared)
                shared.refs += 1
                table += shared.blocks
                self._last[seq] = shared
            self.registered[seq] = len(table)
        return len(table) * self.block_size

    def _split(self, run: Run, size: int) -> Run:
        """Cut the first `size` blocks off `run` and off its copies; `run` is what follows them then."""
        first = run.first
        serving = None if first is None else self.index.get(first)
        twins = [] if first is None else self._twins.get(first, [])
        if first is None or serving is None or not (run is serving or run in twins):
            return self._cut(run, size)
        begins = {copy: self._cut(copy, size) for copy in (serving, *twins)}
        self.index[first] = begins[serving]
        if twins:
            self._twins[first] = [begins[twin] for twin in twins]
        following = run.first
        assert following is not None
        if following not in self.index:  # as ever where hashes name prefixes
            self.index[following] = serving
            if twins:
                self._twins[following] = twins
        return begins[run]

    def _cut(self, run: Run, size: int) -> Run:
        begin = run.cut(size)
        self._starts[begin.blocks[0]], self._starts[run.blocks[0]] = begin, run
        if not run.refs:
            self._idle.put_behind(begin, run)
        return begin

    # ------------------------------------------------------------------ taking blocks

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
        table += self._unused[: -need - 1 : -1]
        del self._unused[-need:]

    def extend_each(self, jobs: Sequence[Job], steps: int) -> None:
        """Make every job hold `steps` positions more than it has computed, in order."""
        tables, unused, size = self.tables, self._unused, self.block_size
        for job in jobs:
            upto, table = job.computed + steps, tables[job.seq]
            if upto <= len(table) * size:
                continue
            if upto <= (len(table) + 1) * size and unused:
                table.append(unused.pop())
            else:
                self.extend(job, upto)

    def _empty(self, short: int) -> None:
        """Turn idle blocks into unused ones."""
        if self.choose_idle is not None:
            self._empty_chosen(self.choose_idle(short))
            return
        while short > 0:
            run = self._idle.oldest
            over = len(run.blocks) - short
            if self.on_emptied is not None and run.first not in self._twins:
                self.on_emptied(run, max(0, over))
            if over > 0 and not (self._twins and run.first in self._twins):
                self.news.forget(run, over)
                self._unused += self._idle.trim(run, short)
                return
            if over > 0:
                self._split(run, over)
            short -= len(run.blocks)
            self._idle.remove(run)
            self._drop(run)

    def _empty_chosen(self, chosen: Sequence[int]) -> None:
        """The same for the blocks that the policy chose, wherever in their runs they are."""
        left, self._is_whole = set(chosen), False
        for run in self._idle:
            if not left:
                break
            if left.isdisjoint(run.blocks):
                continue
            for part in self._parts(run, left):
                if part.blocks[0] in left:
                    if self.on_emptied is not None:
                        self.on_emptied(part, 0)
                    left.difference_update(part.blocks)
                    self._idle.remove(part)
                    self._end(part)
        assert not left, f"the policy chose blocks {sorted(left)}, which are not idle"
        self._unused += chosen

    def _parts(self, run: Run, chosen: set[int]) -> list[Run]:
        """Cut `run` into runs that are chosen, or not, as a whole."""
        sizes = [len(list(part)) for _, part in groupby(map(chosen.__contains__, run.blocks))]
        return [*(self._split(run, size) for size in sizes[:-1]), run]

    # ------------------------------------------------------------------ names

    def register(self, job: Job, upto: int) -> bool:
        """Remember the full blocks of positions [0, upto) under the job's hashes; whether its table has changed."""
        seq = job.seq
        done = self.registered.get(seq, 0)
        full = min(upto // self.block_size, len(job.hashes))
        last = self._last.get(seq)
        if full <= done or (last is not None and last.names is None):  # behind what nobody wrote
            return False
        self.registered[seq] = full
        hashes, blocks = job.hashes, self.tables[seq][done:full]
        if not self._is_new(hashes, done, full):
            self._last[seq] = self._register_known(blocks, hashes[done:full])
        elif last is not None and last.refs == 1 and self._is_alone(last):
            last.names, last.at = hashes, done - len(last.blocks)
            last.blocks += blocks
            self.news.name(last, len(last.blocks) - len(blocks))
        else:
            self._last[seq] = self._begin(blocks, hashes, done)
        return False

    def _is_new(self, hashes: list[BlockHash], start: int, end: int) -> bool:
        if self._is_whole:
            return hashes[start] not in self.index
        return self.index.keys().isdisjoint(hashes[start:end])

    def _is_alone(self, run: Run) -> bool:
        """Whether no other run has the same contents."""
        first = run.first
        return first is not None and self.index.get(first) is run and first not in self._twins

    def _begin(self, blocks: list[int], names: list[BlockHash], at: int) -> Run:
        run = self.index[names[at]] = self._starts[blocks[0]] = Run(blocks, names, at, 1)
        self.news.name(run)
        return run

    def _register_known(self, blocks: list[int], fresh: list[BlockHash]) -> Run:
        """Some of these contents are here already: the last of the runs that these blocks become."""
        at, run = 0, None
        while at < len(fresh):
            serving = self.index.get(fresh[at])
            if serving is None:
                rest = fresh[at:]
                size = next(compress(count(), map(self.index.__contains__, rest)), len(rest))
                run = self._begin(blocks[at : at + size], fresh, at)
            else:
                names = serving.hashes()
                size = num_alike(names, fresh[at : at + len(names)])
                if size < len(names):
                    self._split(serving, size)
                run = Run(blocks[at : at + size], fresh, at, 1)
                self._starts[blocks[at]] = run
                self._twins.setdefault(fresh[at], []).append(run)
                self.news.name(run)
            at += size
        assert run is not None
        return run

    def _forget(self, run: Run) -> None:
        """Nobody finds the contents of `run` any more; a copy of it may serve from now on."""
        first = run.first
        if first is None:
            return
        self.news.forget(run)
        run.names = None
        twins = self._twins.get(first)
        if self.index.get(first) is run:
            if twins:
                self.index[first] = twins.pop(0)
            else:
                del self.index[first]
        elif twins and run in twins:
            twins.remove(run)
        if twins is not None and not twins:
            del self._twins[first]

    # ------------------------------------------------------------------ giving blocks back

    def shrink(self, job: Job, upto: int) -> bool:
        """Give back what of the job's blocks lies behind position `upto`, all without a name; whether any did."""
        table, kept = self.tables[job.seq], -(-upto // self.block_size)
        gone = table[: kept - 1 : -1]
        del table[kept:]
        self._unused += gone
        return bool(gone)

    def release(self, job: Job, computed: int | None = None) -> int:
        """Take all blocks from `job`; how many became free. Those beyond `computed` positions are forgotten."""
        table, before = self.tables.pop(job.seq, []), self.free
        named = self.registered.pop(job.seq, 0)
        if not named:
            self._unused += table[::-1]
            return len(table)
        self._last.pop(job.seq)
        trusted = len(table) if computed is None else computed // self.block_size
        self._unused += table[: named - 1 : -1]
        for run in reversed(self._runs(table, named)):
            named -= len(run.blocks)
            if run.refs > 1:
                run.refs -= 1
            else:
                self._give_back(run, max(0, trusted - named))
        return self.free - before

    def _give_back(self, run: Run, trusted: int) -> None:
        """Its last holder leaves. Contents beyond its first `trusted` blocks were never computed."""
        kept = run
        if trusted < len(run.blocks):
            self._is_whole = False  # who shared them for a time may have gone on
        if not (run.names and trusted and self.has_prefix_cache):
            self._drop(run)
            return
        if trusted < len(run.blocks):
            kept = self._split(run, trusted)
            self._drop(run)
        kept.refs = 0
        kept.keep_own_names()
        self._idle.append(kept)

    def _drop(self, run: Run) -> None:
        self._end(run)
        self._unused += reversed(run.blocks)

    def _end(self, run: Run) -> None:
        self._forget(run)
        del self._starts[run.blocks[0]]

    def disown(self, job: Job, start: int) -> set[int]:
        """Forget the hashes of what `job` holds from position `start` on: nobody wrote it. The blocks stay held."""
        start, self._is_whole = start // self.block_size, False
        table, at = self.tables[job.seq], 0
        for run in self.runs(job.seq):
            size = len(run.blocks)
            if at < start < at + size:
                self._split(run, start - at)
            if start < at + size:
                self._forget(run)
            at += size
        return set(table[start:])

    def reset_cache(self) -> int:
        """Forget every idle block; how many there were."""
        blocks = self._idle.num_blocks
        for run in self._idle:
            self._idle.remove(run)
            self._drop(run)
        return blocks

    def contents(self) -> dict[int, BlockHash]:
        """The name of each block that has one."""
        pairs = (zip(run.blocks, run.hashes(), strict=False) for run in self._starts.values())
        return dict(chain.from_iterable(pairs))

    def check(self) -> None:
        """Recompute the invariants: every block in one state, runs as long as their names say, copies cut alike."""
        refs = holders_of(self.tables, self.registered, self._last, self.runs)
        free = [*self._unused, *self.idle_blocks()]
        assert len(free) == self.free, "free blocks are miscounted"
        check_tables(self.tables, self.registered, free, self.total)
        check_runs(refs, self._idle, self._starts)
        check_names({*refs, *self._idle}, self.index, self._twins)
