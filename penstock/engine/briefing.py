"""What the executor has been told: turns chunks of live jobs into plans of plain numbers.

An executor keeps the state of the jobs it met (tokens, block table, sampler). It hears of a job once (Opening), then
only of the blocks it does not know yet, and in the end that the job is closed. After a preemption the block table
starts afresh, the other state stays.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.plans import Opening, Plan, Work
from penstock.core.types import Job, PlanId
from penstock.core.views import Batch, Chunk, Lane
from penstock.engine.ledger import BlockLedger


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
    ) -> tuple[Plan, list[Job]]:
        """Take blocks for the lane's chunks, in order, and write the plan; the live jobs come with it."""
        jobs: list[Job] = []
        works: list[Work] = []
        opened: list[Opening] = []
        for chunk in lane.chunks:
            job: Job = chunk.job  # type: ignore[assignment]
            if job.seq not in self._met:
                self._met.add(job.seq)
                opened.append(Opening(job.seq, job.request, job.answer))
            jobs.append(job)
            works.append(self._work(job, chunk))
        plan = Plan(
            PlanId(self._next_plan),
            tuple(works),
            tuple(opened),
            tuple(self._closed),
            place,
            lane.share,
            batch.nano,
            num_running,
            num_waiting,
        )
        self._next_plan += 1
        self._closed = []
        return plan, jobs

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
            return Work(job.seq, start, chunk.tokens, samples)
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
