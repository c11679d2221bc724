"""What the executor has been told: turns chunks of live jobs into plans of plain numbers.

An executor keeps the state of the jobs it met (tokens, block table, sampler). It hears of a job once (Opening), then
only of the blocks it does not know yet, and in the end that the job is closed. After a preemption the block table
starts afresh, the other state stays.

Nearly every step there is continues every job by one token inside a block it holds: `_decodes` writes those in one
pass, by columns, and also finds out for how many steps the same plan could go on. Until a job reaches `_calm` there is
nothing to do about its blocks. Chunks of all other steps go through `_work`.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.canvas import CanvasJob
from penstock.core.moving import JobState
from penstock.core.plans import Decodes, Opening, Plan, Work
from penstock.core.types import Job, PlanId
from penstock.core.views import Batch, Chunk, JobView, Lane, Singles
from penstock.engine.ledger import BlockLedger


class Briefing:
    """One per executor."""

    def __init__(self, ledger: BlockLedger, num_layers: int, *, names_ahead: bool = True) -> None:
        """`names_ahead`: full blocks get their names when they are planned, so that the same step may share them.

        Not where another plan can run before this one has written them: there the replica names them afterwards.
        """
        self._ledger, self._num_layers = ledger, num_layers
        self._names_ahead = names_ahead
        self._told: dict[int, int] = {}  # blocks of each running job the executor knows
        self._calm: dict[int, int] = {}  # first position that needs a look at the job's blocks
        self._fetching: set[int] = set()  # their blocks get names when they are there
        self._unproven: set[int] = (
            set()
        )  # came from elsewhere, and their blocks get names when that is over
        self._brought: dict[int, JobState] = {}  # what the executor is to be told of those
        self._borrowing: set[int] = set()  # their blocks never get names
        self._met: set[int] = set()
        self._closed: list[int] = []
        self._next_plan = 0

    def plan(
        self, place: int, lane: Lane, batch: Batch, num_running: int, num_waiting: int
    ) -> tuple[Plan, Sequence[Job], int]:
        """Take blocks for the lane's chunks, in order, and write the plan.

        With it come the live jobs, and the number of steps until one of them reaches its length if all of them decode
        (1 otherwise).
        """
        chunks = lane.chunks
        jobs: tuple[Job, ...] = ()
        decodes: Decodes | None = None
        left = 1
        if isinstance(chunks, Singles) and self._knows(chunks.jobs):
            jobs = chunks.jobs  # type: ignore[assignment]
            decodes, left = self._decodes(jobs)
            chunks = chunks.others
        work: tuple[Work, ...] = ()
        opened: tuple[Opening, ...] = ()
        if chunks:
            others: list[Job] = [chunk.job for chunk in chunks]  # type: ignore[misc]
            opened = tuple([self._open(job) for job in others if job.seq not in self._met])
            pairs = zip(others, chunks, strict=True)
            work = tuple([self._work(job, chunk) for job, chunk in pairs])
            jobs, left = (*jobs, *others), 1
        if decodes is not None:
            decodes.others = work
        plan = Plan(
            PlanId(self._next_plan),
            work if decodes is None else decodes,
            opened,
            tuple(self._closed),
            place,
            lane.share,
            batch.nano,
            num_running,
            num_waiting,
        )
        self._next_plan += 1
        if self._closed:
            self._closed = []
        return plan, jobs, left

    def decodes(self, jobs: Sequence[Job]) -> tuple[Plan, int]:
        """The plan of one token of each of these, all of whom run and nobody else, and nobody waits."""
        if not self._knows(jobs):
            lane, num = Lane(Singles(tuple(jobs))), len(jobs)
            plan, _, left = self.plan(0, lane, Batch(), num, 0)
            return plan, left
        work, left = self._decodes(jobs)
        closed, number = self._closed, self._next_plan
        self._next_plan = number + 1
        if closed:
            self._closed = []
        plan = Plan(PlanId(number), work, (), tuple(closed), 0, 1.0, None, len(jobs), 0)
        return plan, left

    def _knows(self, jobs: Sequence[JobView]) -> bool:
        """Whether each was planned since it last started to run."""
        return all(map(self._told.get, [job.seq for job in jobs]))

    def _open(self, job: Job) -> Opening:
        self._met.add(job.seq)
        return Opening(job.seq, job.request, job.answer, self._brought.pop(job.seq, None))

    def _decodes(self, jobs: Sequence[Job]) -> tuple[Decodes, int]:
        """One token of each job, all of which generate."""
        calm, left = self._calm, 1 << 62
        fresh: dict[int, tuple[int, ...]] = {}
        starts = []
        for job in jobs:
            start = job.computed + job.in_flight
            if start >= calm.get(job.seq, 0):
                self._take(job, start, fresh)
            job.in_flight += 1
            starts.append(start)
            rest = job.max_tokens - job.num_output
            if rest < left:
                left = rest
        return Decodes(tuple([job.seq for job in jobs]), tuple(starts), fresh), left

    def _take(self, job: Job, start: int, fresh: dict[int, tuple[int, ...]]) -> None:
        """See to the blocks of a job that computes one position: a new one, or a name for one that it fills."""
        ledger, seq = self._ledger, job.seq
        table = ledger.tables[seq]
        room = len(table) * ledger.block_size
        if start >= room:
            ledger.extend(job, start + 1)
            room = len(table) * ledger.block_size
        if self._names_ahead and len(job.hashes) > ledger.registered[seq]:
            if not self.is_unproven(seq):
                ledger.register(job, start + 1)
        told = self._told[seq]
        if told != len(table):
            self._told[seq], fresh[seq] = len(table), tuple(table[told:])
        # The last position of a block gives it its name, which real tokens get only on the way.
        self._calm[seq] = room - 1

    def _on_canvas(self, job: Job, chunk: Chunk) -> Work:
        """A job that has all its blocks from the first step on, none of them with a name."""
        assert isinstance(job, CanvasJob), f"job {job.seq} has no phases"
        ledger, told = self._ledger, self._told.get(job.seq)
        if told is None:
            ledger.adopt(job)
            ledger.extend(job, job.room)
        table = tuple(ledger.tables[job.seq])
        self._told[job.seq] = len(table)
        start = job.block[0] if chunk.phase == "reuse" else 0
        job.in_flight += chunk.tokens
        fresh = () if told else table
        return Work(job.seq, start, chunk.tokens, True, fresh, not told, None, chunk.phase)

    def _with_room(self, job: Job, chunk: Chunk) -> Work:
        """The last token of a job and room for guesses, in blocks of which none gets a name for them."""
        ledger, told = self._ledger, self._told[job.seq]
        start = job.computed + job.in_flight
        ledger.extend(job, start + chunk.tokens)
        if self._names_ahead and not self.is_nameless(job.seq):
            ledger.register(job, start + 1)
        job.in_flight += chunk.tokens
        table = ledger.tables[job.seq]
        self._told[job.seq] = len(table)
        fresh = tuple(table[told:])
        return Work(job.seq, start, chunk.tokens, True, fresh, not told, None, "verify")

    def verified(self, job: Job) -> None:
        """Its plan has ended: blocks that only wrong guesses needed are given back, and the rest is told again."""
        if self._ledger.shrink(job, job.computed):
            self.retell(job)

    def _work(self, job: Job, chunk: Chunk) -> Work:
        if chunk.phase == "verify":
            return self._with_room(job, chunk)
        if chunk.phase != "extend":
            return self._on_canvas(job, chunk)
        ledger = self._ledger
        told = self._told.get(job.seq)
        if told is None:
            # What earlier chunks of this step registered can be shared by now; see engine.fork.
            job.computed = ledger.adopt(job)
            if not job.num_preemptions:
                job.cached = job.computed
        start = job.computed + job.in_flight
        upto = start + chunk.tokens
        ledger.extend(job, upto)
        is_whole = chunk.layers is None or chunk.layers[1] == self._num_layers
        if is_whole and self._names_ahead and not self.is_nameless(job.seq):
            ledger.register(job, upto)
        job.in_flight += chunk.tokens
        table = ledger.tables[job.seq]
        samples = is_whole and upto == job.known and job.request.kind == "generate"
        num_blocks = len(table)
        if told == num_blocks and chunk.layers is None:
            return Work(job.seq, start, chunk.tokens, samples, phase=chunk.phase)
        self._told[job.seq] = num_blocks
        fresh = tuple(table[told or 0 :])
        return Work(
            job.seq, start, chunk.tokens, samples, fresh, not told, chunk.layers, chunk.phase
        )

    def is_nameless(self, seq: int) -> bool:
        """Whether its blocks must not be found by others yet."""
        return seq in self._fetching or self.is_unproven(seq)

    def is_unproven(self, seq: int) -> bool:
        return seq in self._unproven or seq in self._borrowing

    def borrow(self, job: Job) -> None:
        """A part of its context may lie elsewhere: nobody finds the rest, and it finds nothing."""
        self._borrowing.add(job.seq)
        job.hashes.clear()

    def borrows(self, seq: int) -> bool:
        return seq in self._borrowing

    def bring(self, job: Job, state: JobState) -> None:
        """A job goes on that began elsewhere: with the blocks it holds by now, or with what was said alone."""
        self._brought[job.seq] = state
        if state.computed:
            self._told[job.seq] = 0
            self._unproven.add(job.seq)

    def brought(self, seq: int) -> JobState | None:
        """What the executor has not been told of a job yet."""
        return self._brought.get(seq)

    def proven(self, job: Job) -> None:
        """What was copied is what the source held."""
        self._unproven.discard(job.seq)
        if self._ledger.held(job):
            self._name(job)

    def fetching(self, job: Job) -> None:
        """An admitted job goes on with blocks that are copied to the device."""
        self._told[job.seq] = 0
        self._fetching.add(job.seq)

    def fetched(self, job: Job) -> None:
        """They are there: now others may find them. What a plan behind the copy computes has its name as well."""
        self._fetching.discard(job.seq)
        self._name(job)

    def _name(self, job: Job) -> None:
        if self._names_ahead:
            self._ledger.register(job, job.computed + job.in_flight)
        elif not job.in_flight and self._ledger.register(job, job.computed):
            self.retell(job)

    def retell(self, job: Job) -> None:
        """It holds other blocks with the same contents from now on: the executor is told all of them again."""
        self._told[job.seq] = 0
        self._calm.pop(job.seq, None)

    def preempted(self, job: Job) -> None:
        self._told.pop(job.seq, None)
        self._calm.pop(job.seq, None)

    def ended(self, job: Job) -> None:
        self._fetching.discard(job.seq)
        self._borrowing.discard(job.seq)
        self._unproven.discard(job.seq)
        self._brought.pop(job.seq, None)
        self._told.pop(job.seq, None)
        self._calm.pop(job.seq, None)
        if job.seq in self._met:
            self._met.remove(job.seq)
            self._closed.append(job.seq)

    def take_closed(self) -> Sequence[int]:
        """Jobs that ended since the last plan, when no plan is due to say so."""
        closed, self._closed = self._closed, []
        return closed
