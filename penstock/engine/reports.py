"""What a replica says of itself: the sums over its jobs that whoever sends it requests may go by.

One pass over the jobs a report, and reports are made at most every `report_s` seconds. What of the waiting prompts its
blocks hold already is looked up only in replicas that tell of their blocks, and single jobs are listed only where
somebody chooses among them (ReplicaConfig.tells). A report is due when something happened to somebody outside; where
memory that fills up step by step matters, one is due every `report_s` seconds while there is work ("steady").

Steps that repeat are booked when the last of them has ended (engine.launch). A report in between adds those that ended,
so that it says what it would say had they been launched one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from msgspec import UNSET, UnsetType

from penstock.core.images import images_of
from penstock.core.types import Job, JobReport, Report, Request
from penstock.core.views import JobView
from penstock.engine.flights import Flights
from penstock.engine.parts import Parts

NEAR = 64  # waiting jobs that may run soon
Tells = Literal["blocks", "jobs", "steady"]


class Reporter:
    """`prompt_room`: tokens of prompts that fit into one step, as far as the batch policy says.

    `head`: who waits and was ranked first when that was last asked.
    """

    def __init__(
        self, parts: Parts, flights: Flights, *, max_context: int, prompt_room: int,
        head: Callable[[], JobView | None], tells: Sequence[Tells] = (),
    ) -> None:  # fmt: skip
        self._parts, self._flights = parts, flights
        self._max_context, self._room = max_context, prompt_room
        self._tells, self._head = tells, head
        self._seen: dict[int, int] = {}  # tokens that waiting jobs would find here, by seq

    def report(self, now: float, arriving: Sequence[Request], *, is_draining: bool) -> Report:
        """`arriving`: taken, and not lined up yet."""
        parts, roster, ledger = self._parts, self._parts.roster, self._parts.ledger
        waiting, running = roster.waiting.jobs, roster.running.jobs
        size = ledger.block_size
        prefill, decoding, context, urgent = _sums(running)
        num_waiting, tokens, blocks = roster.num_blocked, 0, 0
        if waiting or arriving:
            num_waiting += len(waiting) + sum([one.n for one in arriving])
            tokens, blocks = _queue(waiting, arriving, size)
        ahead, free = self._flights.ahead(), ledger.free
        for jobs, steps in ahead:
            context += steps * len(jobs)
            free -= sum([self._more(job, steps) for job in jobs])
        accepts = not num_waiting and not is_draining and prefill < self._room
        return Report(
            replica=parts.name,
            at=now,
            is_draining=is_draining,
            num_running=len(running),
            num_waiting=num_waiting,
            waiting_tokens=tokens,
            free_blocks=free,
            total_blocks=ledger.total,
            block_size=size,
            max_context=self._max_context,
            step_s=parts.step_s,
            lanes=self._flights.lanes(parts.executor.caps.max_lanes),
            adapters=None if roster.residents is None else roster.residents.report(),
            drafts=parts.drafts,
            prefill_tokens=prefill,
            cached_tokens=self._cached(waiting) if "blocks" in self._tells else 0,
            num_decoding=decoding,
            decode_tokens=context,
            num_urgent=urgent,
            waiting_blocks=blocks,
            head_blocks=-(-(self._head() or waiting[0]).known // size) if waiting else 0,
            oldest_wait_s=now - min([job.arrived_at for job in waiting]) if waiting else 0.0,
            num_preemptions=roster.num_preemptions,
            is_accepting=accepts,
            jobs=self._jobs(now, ahead) if "jobs" in self._tells else UNSET,
            image_tokens=self._image_tokens(arriving),
        )

    def _more(self, job: Job, steps: int) -> int:
        """Blocks that a job took in so many steps which are not booked yet, the one that runs now included."""
        ledger = self._parts.ledger
        return max(0, -(-(job.computed + steps + 1) // ledger.block_size) - ledger.held(job))

    def _image_tokens(self, arriving: Sequence[Request]) -> int | UnsetType:
        images = self._parts.roster.images
        tokens = images.num_tokens if images.jobs else 0
        for request in arriving:
            if request.parts:
                tokens += sum(images_of(request))
        return tokens or UNSET

    def _cached(self, waiting: Sequence[Job]) -> int:
        """Tokens that waiting prompts would find: looked up anew for the first NEAR, once for those behind them."""
        fork, before = self._parts.ledger.fork(), self._seen
        self._seen = found = {}
        for place, job in enumerate(waiting):
            if job.hashes:
                known = before.get(job.seq) if place >= NEAR else None
                found[job.seq] = fork.cached(job) if known is None else known
        return sum(found.values())

    def _jobs(
        self, now: float, ahead: Sequence[tuple[Sequence[Job], int]]
    ) -> tuple[JobReport, ...]:
        unbooked = {job.seq: steps for jobs, steps in ahead for job in jobs}
        roster, held = self._parts.roster, self._parts.ledger.held
        jobs = (*roster.running.jobs, *roster.fetched.values(), *roster.waiting.jobs)
        return tuple(
            [
                _told(job, now, held(job) + (self._more(job, steps) if steps else 0), steps)
                for job in jobs
                for steps in (unbooked.get(job.seq, 0),)
            ]
        )


def _queue(waiting: Sequence[Job], arriving: Sequence[Request], size: int) -> tuple[int, int]:
    """Tokens to compute of those who wait, and the blocks that they will take."""
    tokens = blocks = 0
    for job in waiting:
        tokens += job.todo
        blocks -= -(job.num_prompt + job.num_output) // size
    for one in arriving:
        tokens += one.n * one.prompt.num_tokens
        blocks += one.n * -(-one.prompt.num_tokens // size)
    return tokens, blocks


def _sums(running: Sequence[Job]) -> tuple[int, int, int, int]:
    """Prompt tokens left, decoding jobs and the positions they read, jobs before priority 0."""
    prefill = decoding = context = urgent = 0
    for job in running:
        left = job.num_prompt - job.computed
        if left > 0:
            prefill += left
        else:
            decoding += 1
            context += job.num_prompt + job.num_output
        if job.priority < 0:
            urgent += 1
    return prefill, decoding, context, urgent


def _told(job: Job, now: float, num_blocks: int, steps: int) -> JobReport:
    return JobReport(
        job.request.id, job.answer, job.status, job.priority, now - job.arrived_at, job.num_prompt,
        job.num_output + steps, job.max_tokens, job.computed + steps, num_blocks,
    )  # fmt: skip
