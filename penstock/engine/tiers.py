"""Cached prefixes that outlive the device's memory: they go to host memory, from there to disk, and come back.

    leave     idle blocks that lose their place on the device are copied to host memory (bounded; engine.tier_store),
              and those that are next to lose it are copied ahead of that
    file      what comes to host memory is written to disk, the longest unused first (engine.filings)
    press     host memory has no room but for blocks that are to be written yet, and who waits would push more into it:
              nobody is admitted until the disk has caught up, if the policy finds that worth it
    read      a prompt that waits continues what the device and host memory hold with blocks on disk: it is held back
              until they are in host memory again, once
    promote   a prompt that waits continues what the device holds with blocks in host memory: they are copied back and
              count as cached from that moment. Policies see nothing but a longer cached prefix

Nobody holds a block that is brought back: it is idle and known by name, like any other cached one, so it can be shared
by all who wait for it. That its copy may still be under way is the executor's affair: no plan reads a block before
copies to it have ended, and no copy overtakes another one of the same block (core.ports.MovingExecutor). Therefore
blocks may leave only where whoever gets them next goes through the executor too; `aside` is for those who do not.

Looked at are the first NEAR jobs that wait, in the order in which they came, and only while the whole prompt of one
would fit: what is brought for others would be gone when their turn comes. Whether a copy is worth it is for the policy
of kind `fetch` to say, which is told what copies took lately and what the cost model says of computing; it is asked
the same of blocks that are to be saved. Who runs is never held up: what that pushes out when there is no room is lost,
and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from msgspec import Struct

from penstock.core.events import Transferred
from penstock.core.messages import NO_CHANGES, BlockNews
from penstock.core.plans import Filed, Moved, Transfer
from penstock.core.ports import FilingExecutor
from penstock.core.types import BlockHash, Job
from penstock.engine.bringing import NEAR, Bringing
from penstock.engine.filings import FILED, Filings
from penstock.engine.ledger import BlockLedger
from penstock.engine.parts import Parts
from penstock.engine.run import Run
from penstock.engine.swap import device_blocks, joined
from penstock.engine.tier_store import TierStore
from penstock.policy import fetch

AHEAD = 16  # a share of the device's blocks that is saved before it has to be: 1 / AHEAD
LOSING = (
    "%s: cached blocks come to host memory faster than the disk takes them, and some are lost; a larger host_bytes "
    "helps, and /metrics counts them"
)
_log = logging.getLogger("penstock.engine")


class _Copy(Struct, gc=False):
    transfer: Transfer
    names: Sequence[BlockHash]
    begun_at: float


class Tiers:
    """One per replica with memory for cached blocks behind the device's. All calls on the loop's thread."""

    def __init__(
        self,
        parts: Parts,
        bringing: Bringing,
        *,
        numbers: Iterator[int],
        ask_again: Callable[[], None],
    ) -> None:
        """`numbers`: of transfers, none of which is given twice."""
        caps = parts.executor.caps
        self._parts, self._bringing = parts, bringing
        self._numbers = numbers
        self._executor = cast(FilingExecutor, parts.executor)
        self.store = TierStore(caps.tier_blocks, caps.disk_blocks)
        if caps.disk_blocks:
            self.store.restore(self._executor.found)
        self.first = caps.host_blocks  # of ours; those before it are engine.swap's
        self._leaving: list[tuple[int, int, BlockHash]] = []  # device block, host block
        self._copies: dict[int, _Copy] = {}
        self._filings = Filings(parts, bringing, self.store, ask_again)
        self._was_held: set[int] = set()
        self.is_pressed = False  # nobody is to be admitted now
        self._is_aside = False
        link = caps.link
        if link is not None:
            bringing.block_s["host"] = link.seconds(1, FILED, 1) / FILED
        parts.ledger.on_emptied = self._leave
        self.read_by_peers: Callable[[], list[BlockHash]] = list

    def coming(self) -> set[int]:
        """Device blocks into which something is being copied."""
        transfers = [each.transfer for each in self._copies.values()]
        return device_blocks(each for each in transfers if not each.is_out)

    def copied(self) -> set[int]:
        """Those that are copied from or to, now or with the next step."""
        leaving = {block for block, _, _ in self._leaving}
        return leaving | device_blocks(each.transfer for each in self._copies.values())

    def has(self, transfer: int) -> bool:
        return transfer in self._copies

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Meanwhile blocks are forgotten as if there were no tiers."""
        self._is_aside = True
        try:
            yield
        finally:
            self._is_aside = False

    def _leave(self, run: Run, start: int) -> None:
        """The contents of a run from its block number `start` on lose their place on the device."""
        if self._is_aside:
            return
        keep, first = self.store.keep, self.first
        pairs = zip(reversed(run.blocks[start:]), reversed(run.hashes()[start:]), strict=True)
        for block, name in pairs:
            host = keep(name)
            if host is not None:
                self._leaving.append((block, first + host, name))
        lost = self.store.take_lost()
        if lost:
            if self._bringing.lose("disk", lost):
                _log.warning(LOSING, self._parts.name)

    def begin(self, now: float) -> None:
        """Copy what has left, before anything else touches its blocks; then what will have to leave next."""
        if self._leaving:
            leaving, self._leaving = sorted(self._leaving), []
            self._copy(now, True, [one[:2] for one in leaving], [one[2] for one in leaving])
        ahead = sorted(self._ahead())
        if ahead:
            self._copy(now, True, [one[:2] for one in ahead], [one[2] for one in ahead])

    def _ahead(self) -> Iterator[tuple[int, int, BlockHash]]:
        """The longest unused blocks that host memory does not have yet, while few are free of contents.

        So that a step which needs their places seldom waits for a copy. One such copy at a time, and no more than
        half of host memory: else each would make room of the one before it, for ever.
        """
        ledger, store = self._parts.ledger, self.store
        if any([each.transfer.is_out for each in self._copies.values()]):
            return
        for block, name in ledger.next_to_go(min(ledger.total // AHEAD, store.num_host // 2)):
            if name not in store.host and name not in store.disk:
                host = store.keep(name, is_ahead=True)
                if host is None:
                    return
                yield block, self.first + host, name

    def _copy(
        self, now: float, is_out: bool, pairs: list[tuple[int, int]], names: Sequence[BlockHash]
    ) -> None:
        transfer = Transfer(next(self._numbers), None, is_out, joined(pairs))
        self._copies[transfer.id] = _Copy(transfer, names, now)
        self._executor.transfer(transfer)

    # ------------------------------------------------------------------ back

    def prepare(self, now: float) -> None:
        """Bring what those who wait could use."""
        self.is_pressed = self._is_short_of_room(now)
        if self.store.host or self.store.disk:
            for job in self._parts.roster.waiting.jobs[:NEAR]:
                self._bring(now, job)
        self.begin(now)

    def _is_short_of_room(self, now: float) -> bool:
        """Whether those who wait would push blocks out that the disk can still be given, and are to let it."""
        store, ledger, roster = self.store, self._parts.ledger, self._parts.roster
        jobs, size = roster.waiting.jobs[:NEAR], ledger.block_size
        if not jobs or self._filings.writing is None:
            return False
        coming = sum([1 - -job.known // size - ledger.held(job) for job in roster.running.jobs])
        need = coming + sum([1 - -job.known // size for job in jobs])
        if need <= store.room:
            return False
        for job in jobs:
            need -= sum(ledger.find(job.hashes, 0, len(job.hashes)).values())
        leaving = ledger.next_to_go(min(need, ledger.free))
        lost = -store.room
        lost += sum([name not in store.host and name not in store.disk for _, name in leaving])
        if lost <= 0:
            return False
        block_s = self._filings.save_s(now)
        copy_s = None if block_s is None else block_s * lost
        return self._bringing.wants(now, "disk", jobs[0], have=0, more=lost, copy_s=copy_s)

    def _bring(self, now: float, job: Job) -> None:
        ledger, store, names = self._parts.ledger, self.store, job.hashes
        limit = min((job.known - 1) // ledger.block_size, len(names))
        if limit < 1 or job.seq in ledger.copies:
            return
        found = ledger.find(names, 0, limit)
        here = sum(found.values())
        if here >= limit or not self._bringing.fits(job, found):
            return
        ready = store.in_host(names, here, limit)
        if store.disk and self._is_read(now, job, here + ready, limit):
            return
        if ready and not self.is_pressed and self._wants(now, "host", job, here, ready):
            self._promote(now, job, ready)

    def _wants(self, now: float, place: fetch.Place, job: Job, have: int, more: int) -> bool:
        block_s = self._bringing.block_s.get(place)
        copy_s = None if block_s is None else block_s * more
        return self._bringing.wants(now, place, job, have=have, more=more, copy_s=copy_s)

    def _is_read(self, now: float, job: Job, have: int, limit: int) -> bool:
        """Whether a job waits for the disk from now on."""
        store, names = self.store, job.hashes
        if job.seq in self._was_held:
            return False
        to_read, coming = store.behind(names, have, limit)
        if to_read and not self._wants(now, "disk", job, have, len(to_read)):
            to_read = []
        if to_read:
            store.touch(reversed(names[:limit]))
            number = self._filings.read(now, to_read)
            if number is not None:
                coming.add(number)
        if not coming:
            return False
        self._was_held.add(job.seq)
        self._filings.hold(job, coming)
        return True

    def _promote(self, now: float, job: Job, ready: int) -> None:
        """Copy blocks back that continue what the device holds, and let them be found."""
        ledger, store, names, first = self._parts.ledger, self.store, job.hashes, self.first
        size = ledger.block_size
        have = ledger.adopt(job) // size  # held meanwhile, so that room is not made of it
        fresh = names[have : have + min(ready, ledger.free)]
        store.touch(reversed(names[: have + len(fresh)]))
        ledger.extend(job, (have + len(fresh)) * size)
        self.begin(now)
        pairs = []
        for block, name in zip(ledger.tables[job.seq][have:], fresh, strict=True):
            kept = store.host.get(name)
            if kept is None:  # room was made of it
                break
            kept.busy += 1
            pairs.append((block, first + kept.block))
        upto = (have + len(pairs)) * size
        if pairs:
            self._copy(now, False, pairs, fresh[: len(pairs)])
            ledger.register(job, upto)
        ledger.release(job, upto)

    # ------------------------------------------------------------------ what has ended

    def moved(self, now: float, moved: Moved) -> None:
        copy = self._copies.pop(moved.transfer)
        transfer = copy.transfer
        told = Transferred(
            at=now,
            who=self._parts.name,
            transfer=transfer.id,
            seq=None,
            is_out=transfer.is_out,
            num_blocks=transfer.num_blocks,
            num_runs=len(transfer.runs),
        )
        self._parts.emit(told)
        if transfer.is_out:
            for name in copy.names:
                self.store.kept(name)
        else:
            count = len(copy.names)
            num_bytes = self._executor.kv_block_bytes * count
            self._bringing.learn("host", count, num_bytes, now - copy.begun_at)
            for name in copy.names:
                self.store.host[name].busy -= 1
        self._filings.write_some(now)

    def filed(self, now: float, filed: Filed) -> None:
        self._filings.ended(now, filed)

    def forget(self, seq: int) -> None:
        """The job has ended."""
        self._was_held.discard(seq)

    def check(self) -> None:
        """Recompute the invariants, and that every copy under way is counted."""
        store = self.store
        store.check()
        busy = [name for copy in self._copies.values() for name in copy.names]
        filed = self._filings.names()
        busy += filed
        busy += [name for _, _, name in self._leaving]
        busy += self.read_by_peers()
        assert sum(kept.busy for kept in store.host.values()) == len(busy), "a copy is miscounted"
        assert sum(there.busy for there in store.disk.values()) == len(filed), "a filing is lost"


def news_of(ledger: BlockLedger, tiers: Tiers | None) -> BlockNews | None:
    """What changed since the last call; None: nothing, or nobody asked."""
    news = ledger.news.take()
    if tiers is None:
        return news
    host, disk = tiers.store.take_news()
    if news is None and host is NO_CHANGES and disk is NO_CHANGES:
        return None
    stored, removed = NO_CHANGES if news is None else news[:2]
    return BlockNews(stored, removed, host, disk)
