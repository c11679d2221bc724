"""A what-if copy of the block ledger. Booking costs a few additions; nothing is copied until something is given back.

Order matters as it does for real: blocks booked for one job count as registered for the jobs asked about later.
Cached blocks found by a job are promised to it from then on: the replica pins the cached blocks of all admitted jobs
before it takes blocks for anybody, so that what a fork found is still there when the decision is applied.

Where blocks get their names only when their step has ended, nothing booked here is found (`BlockLedger.names_ahead`).

The ledger's runs are not cut here: of each run the fork remembers how many of its holders left, and how much of its
beginning each booking takes.

Policies see this through penstock.core.views.LedgerFork, whose arguments are read-only job views; they are the
ledger's own jobs, which is why the mechanism may read `hashes` here.
"""

from __future__ import annotations

from itertools import compress, count
from typing import TYPE_CHECKING, NamedTuple, cast

from penstock.core.types import BlockHash, Job
from penstock.engine.host_copy import HostCopy
from penstock.engine.run import Run, num_alike

if TYPE_CHECKING:
    from penstock.core.views import JobView
    from penstock.engine.ledger import BlockLedger


class Found(NamedTuple):
    """`real`: blocks here now, by run; `pending`: so many that earlier bookings of this fork will have registered."""

    real: dict[Run, int]
    num_real: int
    pending: int


NOTHING = Found({}, 0, 0)


def is_fetched(found: Found, copy: HostCopy | None, block_size: int) -> bool:
    """Whether an admitted job gets its copy back (engine.swap); what others will register meanwhile is no use to it."""
    real = found.num_real
    return copy is not None and copy.first <= real and real * block_size < copy.upto


class Fork:
    """See penstock.core.views.LedgerFork for the meaning of each method."""

    __slots__ = (
        "_ledger",
        "_tables",
        "block_size",
        "total",
        "free",
        "_held",
        "_left",
        "_shared",
        "_gone",
        "_booked",
        "_found",
    )

    def __init__(self, ledger: BlockLedger) -> None:
        self._ledger = ledger
        self._tables = ledger.tables
        self.block_size = ledger.block_size
        self.total = ledger.total
        self.free = ledger.free
        self._held: dict[int, int] = {}
        self._booked: list[tuple[Job, int]] = []
        self._found: dict[int, Found] = {}
        self._shared: dict[Run, list[int]] = {}  # how much of it each booking takes
        self._left: dict[Run, int] = {}  # how many of its real holders are gone
        self._gone: set[int] = set()

    def held(self, job: JobView) -> int:
        held = self._held.get(job.seq)
        return len(self._tables.get(job.seq, ())) if held is None else held

    def cached(self, job: JobView) -> int:
        if self.held(job):
            return 0
        found = self._find(cast(Job, job))
        size = self.block_size
        positions = (found.num_real + found.pending) * size
        copies = self._ledger.copies
        if copies and is_fetched(found, copies.get(job.seq), size):
            return copies[job.seq].upto
        return positions

    def _find(self, job: Job) -> Found:
        found, copies = self._find_any(job), self._ledger.copies
        if found.pending and copies and is_fetched(found, copies.get(job.seq), self.block_size):
            return Found(found.real, found.num_real, 0)
        return found

    def _find_any(self, job: Job) -> Found:
        hashes = job.hashes
        if not hashes:
            return NOTHING
        limit = min((job.known - 1) // self.block_size, len(hashes))
        known = self._found.get(job.seq)
        if known is None:
            real = self._ledger.find(hashes, 0, limit)
            known = self._found[job.seq] = Found(real, sum(real.values()), 0)
        if self._booked and known.num_real + known.pending < limit:
            known = self._found[job.seq] = self._find_more(known, hashes, limit)
        return known

    def _find_more(self, known: Found, hashes: list[BlockHash], limit: int) -> Found:
        """Go on behind what was found when this job was asked about before."""
        real, num_real, pending = known
        while (at := num_real + pending) < limit:
            if hashes[at] in self._ledger.index:
                more = self._ledger.find(hashes, at, limit)
                real = {**real, **more}
                num_real += sum(more.values())
            elif size := self._num_booked(hashes, at, limit):
                pending += size
            else:
                break
        return Found(real, num_real, pending)

    def _num_booked(self, hashes: list[BlockHash], start: int, limit: int) -> int:
        """How many blocks from hashes[start] on one booking will have registered, up to the first that is here."""
        size, wanted, index = self.block_size, hashes[start], self._ledger.index
        for job, upto in self._booked:
            theirs = job.hashes
            end = min(upto // size, len(theirs), limit)
            if job.computed // size <= start < end and theirs[start] == wanted:
                alike = num_alike(theirs[start:end], hashes[start:end])
                known = map(index.__contains__, theirs[start : start + alike])
                return next(compress(count(), known), alike)
        return 0

    def need(self, job: JobView, upto: int) -> int:
        held = self.held(job)
        blocks = -(-upto // self.block_size)
        if held:
            return max(0, blocks - held)
        found = self._find(cast(Job, job))
        fresh = max(0, blocks - found.num_real - found.pending)
        return fresh + sum([self._num_idle(run, size) for run, size in found.real.items()])

    def _num_idle(self, run: Run, size: int) -> int:
        """Of the first `size` blocks of `run`, those that nobody holds here."""
        if run.refs > self._left.get(run, 0):
            return 0
        shared = self._shared.get(run)
        return max(0, size - max(shared)) if shared else size

    def _num_alone(self, run: Run) -> int:
        """Blocks of `run` that only the one job holds which asks."""
        if run.refs - self._left.get(run, 0) > 1:
            return 0
        return len(run.blocks) - max(self._shared.get(run, ()), default=0)

    def reserve(self, job: JobView, upto: int) -> bool:
        seq = job.seq
        held = self._held.get(seq)
        if held is None:
            held = len(self._tables.get(seq, ()))
        if not held:
            return self._start(cast(Job, job), upto)
        need = -(-upto // self.block_size) - held
        if need > 0:
            if need > self.free:
                return False
            self.free -= need
            self._held[seq] = held + need
        fills = upto // self.block_size > job.computed // self.block_size
        if fills and self._ledger.names_ahead:
            self._booked.append((cast(Job, job), upto))
        return True

    def _start(self, job: Job, upto: int) -> bool:
        need = self.need(job, upto)
        if need > self.free:
            return False
        self.free -= need
        found = self._find(job)
        for run, size in found.real.items():
            self._shared.setdefault(run, []).append(size)
        self._held[job.seq] = max(-(-upto // self.block_size), found.num_real)
        copies, names_ahead = self._ledger.copies, self._ledger.names_ahead
        if names_ahead and not is_fetched(found, copies.get(job.seq), self.block_size):
            self._booked.append((job, upto))
        return True

    def release(self, job: JobView) -> int:
        seq, held, before = job.seq, self.held(job), self.free
        if not held:
            return 0
        table = self._tables.get(seq)
        if table and seq not in self._gone:
            self._gone.add(seq)
            self.free += held - self._ledger.registered.get(seq, 0)
            for run in self._ledger.runs(seq):
                self._left[run] = self._left.get(run, 0) + 1
                self.free += self._num_idle(run, len(run.blocks))
        else:
            found = self._found.get(seq, NOTHING)
            self.free += max(0, held - found.num_real - found.pending)
            for run, size in found.real.items():
                self._shared[run].remove(size)
                self.free += self._num_idle(run, size)
        self._held[seq] = 0
        if any(booked is job for booked, _ in self._booked):
            self._unbook(seq)
        return self.free - before

    def _unbook(self, seq: int) -> None:
        """What the job would have filled will not be there: forget it, and what others found on the way."""
        self._booked = [(job, upto) for job, upto in self._booked if job.seq != seq]
        self._found = {
            other: found for other, found in self._found.items() if self._held.get(other)
        }

    def freeable(self, job: JobView) -> int:
        held = self.held(job)
        if not held or job.seq in self._gone or not self._tables.get(job.seq):
            return held
        mine = held - self._ledger.registered.get(job.seq, 0)
        return mine + sum([self._num_alone(run) for run in self._ledger.runs(job.seq)])
