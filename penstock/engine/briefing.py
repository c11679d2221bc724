"""What the executor has been told: turns chunks of live jobs into plans of plain numbers.

An executor keeps the state of the jobs it met (tokens, block table, sampler). It hears of a job once (Opening), then
only of the blocks it does not know yet, and in the end that the job is closed. After a preemption the block table
starts afresh, the other state stays.

Nearly every chunk there is continues a job by one token inside a block it holds; `plan` writes those itself, in one
pass that also finds out for how many steps the same plan could go on. All others go through `_work`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from penstock.core.plans import Opening, Plan, Work
from penstock.core.types import Job, PlanId
from penstock.core.views import Batch, Chunk, Lane
from penstock.engine.ledger import BlockLedger

_new_tuple: Callable[[type[Work], Iterable[object]], Work] = tuple.__new__


class Briefing:
    """One per executor."""

    def __init__(self, ledger: BlockLedger) -> None:
        self._ledger = ledger
        self._told: dict[int, int] = {}  # blocks of each running job the executor knows
        self._met: set[int] = set()
        self._closed: list[int] = []
        self._next_plan = 0

    def plan(
        self, place: int, lane: Lane, batch: Batch, num_running: int, num_waiting: int
    ) -> tuple[Plan, list[Job], int]:
        """Take blocks for the lane's chunks, in order, and write the plan.

        With it come the live jobs, and the number of steps until one of them reaches its length if all of them decode
        (1 otherwise).
        """
        jobs: list[Job] = [chunk[0] for chunk in lane.chunks]  # type: ignore[misc]
        if not self._met.issuperset([job.seq for job in jobs]):
            opened = tuple([self._open(job) for job in jobs if job.seq not in self._met])
        else:
            opened = ()
        works, left = self._works(lane)
        plan = Plan(
            PlanId(self._next_plan),
            tuple(works),
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

    def _open(self, job: Job) -> Opening:
        self._met.add(job.seq)
        return Opening(job.seq, job.request, job.answer)

    def _works(self, lane: Lane) -> tuple[list[Work], int]:
        ledger, told_of, works, left = self._ledger, self._told, [], 1 << 62
        tables, registered, size = ledger.tables, ledger.registered, ledger.block_size
        for chunk in lane.chunks:
            job: Job = chunk[0]  # type: ignore[assignment]
            told = told_of.get(job.seq)
            if told is None or chunk[1] != 1 or chunk[2] is not None:
                work = self._work(job, chunk)
                left = left if work[2] == 1 and work[3] else 1
            else:
                seq, start = job.seq, job.computed + job.in_flight
                table = tables[seq]
                if start >= len(table) * size:
                    ledger.extend(job, start + 1)
                if len(job.hashes) > registered[seq]:
                    ledger.register(job, start + 1)
                job.in_flight += 1
                samples = start + 1 == job.num_prompt + job.num_output
                if not samples or job.request.kind != "generate":
                    samples, left = False, 1
                fresh: tuple[int, ...] = ()
                if told != len(table):
                    told_of[seq], fresh = len(table), tuple(table[told:])
                work = _new_tuple(Work, (seq, start, 1, samples, fresh, False, None, chunk[3]))
            rest = job.max_tokens - job.num_output
            if rest < left:
                left = rest
            works.append(work)
        return works, left

    def _work(self, job: Job, chunk: Chunk) -> Work:
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
        if chunk.layers is None:
            ledger.register(job, upto)
        job.in_flight += chunk.tokens
        table = ledger.tables[job.seq]
        samples = upto == job.known and job.request.kind == "generate"
        num_blocks = len(table)
        if told == num_blocks and chunk.layers is None:
            return Work(job.seq, start, chunk.tokens, samples, phase=chunk.phase)
        self._told[job.seq] = num_blocks
        fresh = tuple(table[told or 0 :])
        return Work(
            job.seq, start, chunk.tokens, samples, fresh, told is None, chunk.layers, chunk.phase
        )

    def preempted(self, job: Job) -> None:
        self._told.pop(job.seq, None)

    def ended(self, job: Job) -> None:
        self._told.pop(job.seq, None)
        if job.seq in self._met:
            self._met.remove(job.seq)
            self._closed.append(job.seq)

    def take_closed(self) -> Sequence[int]:
        """Jobs that ended since the last plan, when no plan is due to say so."""
        closed, self._closed = self._closed, []
        return closed
