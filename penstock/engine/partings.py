"""Jobs that leave this replica for another one, while or before they run.

A job can leave when no plan holds it and no chunk of it is between two layers. Then it is taken out of its list and
held: it keeps its blocks, no policy sees it, and what it is and where its blocks are is told. Settle ends that:
released, it is forgotten without a word to its caller, and its blocks stay findable like those of any job that ends; or
it goes on where it stood. One that ends before it can leave is told to be gone.

What decides here is only the order of inputs, so that replay comes to the same: whoever waits to leave is looked at
after every input of a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from penstock.core.images import ImageJob
from penstock.core.messages import Offered
from penstock.core.moving import JobState, MoveAsked, Parted, SettleHow
from penstock.core.ports import PortableExecutor
from penstock.core.records import Record
from penstock.core.types import Job, Status
from penstock.engine.parts import Parts
from penstock.engine.pauses import Pauses

OnOffered = Callable[[Offered], None]
MOVABLE: tuple[Status, ...] = ("running", "waiting", "offloaded")


class Offering(Record):
    """Asked from outside; see core.messages.Offer."""

    move: int
    request: str
    is_last: bool
    on_offered: OnOffered


class Settling(Record):
    """See core.messages.Settle."""

    move: int
    request: str
    how: SettleHow


class _Held(NamedTuple):
    job: Job
    status: Status


class Partings:
    """One per replica. `answers` are given when a turn has told all outputs that came before."""

    def __init__(
        self,
        parts: Parts,
        pauses: Pauses,
        ask_again: Callable[[], None],
        written: Callable[[Sequence[int]], int],
    ) -> None:
        """`written`: so many of the first of some blocks are not being written now."""
        self._written = written
        self._parts, self._pauses, self._ask_again = parts, pauses, ask_again
        self.asked: dict[int, Offering] = {}  # who waits to leave, by movement
        self._held: dict[int, _Held] = {}
        self.answers: list[Callable[[], None]] = []

    def offer(self, now: float, asked: Offering) -> None:
        """To leave: an input of a turn."""
        told = MoveAsked(at=now, who=self._parts.name, move=asked.move, request=asked.request)
        self._parts.emit(told)
        self.asked[asked.move] = asked
        self.depart(now)

    def show(self, now: float, asked: Offering) -> None:
        """What could be copied already. It changes nothing, and is answered between two turns."""
        job = self._job_of(asked.request)
        if job is None:  # it has not arrived, or has ended
            asked.on_offered(Offered(asked.move, False, JobState()))
            return
        size, full = self._parts.ledger.block_size, 0
        if job.status == "running":
            table = self._parts.ledger.tables.get(job.seq, [])[: job.computed // size]
            table, copied = table[: self._written(table)], self._parts.copied_blocks()
            full = next((at for at, block in enumerate(table) if block in copied), len(table))
        asked.on_offered(self._offered(now, asked, job, full * size))

    def depart(self, now: float) -> None:
        """Let go whoever can."""
        for move, asked in list(self.asked.items()):
            job = self._job_of(asked.request)
            if job is None:
                del self.asked[move]
                self._answer(asked, Offered(move, True, error="it has ended"))
            elif job.is_cancelled or job.in_flight or job.carried:
                continue
            else:
                paused = self._pauses.take(asked.request)
                if paused is not None or job.status in MOVABLE:
                    del self.asked[move]
                    self._part(now, asked, job, paused)

    def settle(self, now: float, told: Settling) -> None:
        """How a movement from here ended."""
        move, how = told.move, told.how
        self.asked.pop(move, None)
        held = self._held.pop(move, None)
        if held is None:
            return
        job = held.job
        if how == "release":
            self._parts.forget(now, job)
        else:
            self._parts.roster.take_back(job, held.status)
            self._ask_again()
            if job.is_cancelled:
                self._parts.finish(now, job, "cancelled")

    # ------------------------------------------------------------------ inside

    def _job_of(self, request: str) -> Job | None:
        jobs = self._parts.roster.jobs_of(request)
        return jobs[0] if len(jobs) == 1 else None

    def _part(self, now: float, asked: Offering, job: Job, paused: Status | None) -> None:
        """`paused`: what a job was that is held already."""
        offered = self._offered(now, asked, job, job.computed)
        self._held[asked.move] = _Held(job, paused or job.status)
        if paused is None:
            self._parts.roster.hold(job)
        parted = Parted(
            at=now,
            who=self._parts.name,
            move=asked.move,
            request=asked.request,
            seq=job.seq,
            num_output=job.num_output,
            computed=job.computed,
        )
        self._parts.emit(parted)
        self._answer(asked, offered)

    def _offered(self, now: float, asked: Offering, job: Job, computed: int) -> Offered:
        size = self._parts.ledger.block_size
        table = self._parts.ledger.tables.get(job.seq, [])
        state = self._state(now, job, computed)
        return Offered(asked.move, asked.is_last, state, tuple(table[: -(-computed // size)]))

    def _state(self, now: float, job: Job, computed: int) -> JobState:
        parts = self._parts
        brought = parts.briefing.brought(job.seq)
        if brought is not None:
            ids, chance = brought.output_ids, brought.chance
        else:
            executor = cast(PortableExecutor, parts.executor)
            ids, chance = executor.take_out(job.seq, job.num_output)
        first = job.num_prompt // parts.ledger.block_size
        return JobState(
            num_output=job.num_output,
            output_ids=ids,
            computed=computed,
            cached=job.cached,
            filled=tuple(job.hashes[first:]) if ids else (),
            chance=chance,
            is_streamed=job.is_streamed,
            num_preemptions=job.num_preemptions,
            num_recomputed=job.num_recomputed,
            age_s=now - job.arrived_at,
            admitted_age_s=_age(now, job.admitted_at),
            first_token_age_s=_age(now, job.first_token_at),
            last_token_age_s=_age(now, job.last_token_at),
            encoded=job.encoded if isinstance(job, ImageJob) else 0,
        )

    def _answer(self, asked: Offering, offered: Offered) -> None:
        self.answers.append(lambda: asked.on_offered(offered))


def _age(now: float, at: float | None) -> float | None:
    return None if at is None else now - at
