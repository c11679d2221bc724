"""One replica: it turns requests into tokens, step by step.

    inputs (requests, cancels, completions) --> inbox
    turn:  take the inbox -> apply it -> if a lane is idle: decide, apply the decision, launch -> tell callers

A turn runs whenever something came in, as one callback of the loop, with one `now`. It is the only place where
state changes, so nothing here waits and nothing interleaves. The same code runs under the wall clock and in
virtual time; what is real is only the executor.

**One step is one transaction.** `order` ranks the waiting, `batch` plans on forks of the ledger (asking `admit` and
`evict` on the way), and the decision is applied in this order: evictions; cached prefixes of all admitted jobs are
pinned; then chunk by chunk, blocks are taken and full ones registered; launch.

**What is logged, and when** (this is what makes `replay` possible). All events of a turn carry its `now`. First the
inputs, in the order in which they are applied: Arrived, Cancelled, Completed (each followed by the Finished it
causes). Then, if a lane was idle and there was work, exactly one Stepped per call of the policies, with `plan` None
when nothing could be launched, before the executor hears of the plan. Whoever feeds the inputs of a log at their
instants, in order, and lets a turn run before going past a Stepped, makes the policies see the very same views.

**Steps that repeat.** When the policies declare their decision stable and all chunks are single tokens, up to
`caps.max_repeat` steps are launched as one. The number is bounded by the next answer that reaches its length and by the
blocks left; an input interrupts it at the next step boundary. Blocks of the repeated positions are taken when the
executor says how many steps it ran, which is the same number at the same moment as if it had stepped.

**Plans that stop inside their forward.** A batch policy may interrupt a running plan at its executor's finest boundary.
Once the executor says Yielded, the plan is suspended: its lane is idle, its jobs keep their blocks and stay in flight,
and it goes on when the policy resumes it. When the last of its jobs is cancelled it is aborted.

**Chunks through some layers.** Until a chunk has passed the last layer its positions are not computed, its blocks have
no name and nothing is sampled; `Job.carried` says how far it came.

**Blocks that move.** With host memory (`ReplicaConfig.swap`) an eviction to "host" copies a job's blocks there, and it
gets them back when it is admitted again (engine.swap). Either the plan waits for the copy, or the job is left out of it
and joins the running when the copy is there; until then no policy sees it. Transfers that end are inputs (Transferred).

**Cancelling** a job that is part of a running plan frees its blocks when that plan, or the copy of
its blocks, ends, otherwise at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from msgspec import Struct

from penstock.core.canvas import CanvasJob
from penstock.core.clock import now as loop_now
from penstock.core.errors import ContextTooLong, Draining, Overloaded
from penstock.core.events import (
    Cancelled,
    Completed,
    Event,
    Refused,
    Stepped,
    Suspended,
    Transferred,
)
from penstock.core.plans import Counted, Decodes, Done, Moved, Plan, Sampled, Work, Yielded
from penstock.core.ports import Completion, Executor, Log, MovingExecutor
from penstock.core.types import FinishReason, Job, Output, PlanId, Report, Request
from penstock.core.views import Chunk, Flying, Lane, Singles
from penstock.engine.briefing import Briefing
from penstock.engine.ledger import BlockLedger
from penstock.engine.roster import NOTHING, Roster
from penstock.engine.swap import Swap, SwapConfig, ledger_of, without
from penstock.engine.turn import Chunks, Council, Predictors, ReplicaPolicies, Verdict

OnOutputs = Callable[[tuple[tuple[str, Output], ...]], None]
Arrival = tuple[Request, bool]
STEPS_UNTIL_RETRY = 100  # a full queue is tried again after about so many steps
SHARED_FAILURE = "a request that begins alike failed in the same step; send this one again"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """What a replica is made with. `max_waiting` None = no bound on its queue.

    `is_checked`: hold every decision to its law and recompute all invariants after every turn (slow; for tests).
    """

    name: str = "replica-0"
    num_blocks: int
    block_size: int = 16
    has_prefix_cache: bool = True
    max_waiting: int | None = None
    seed: int = 0
    is_checked: bool = False
    swap: SwapConfig = SwapConfig()


class Flight(Struct, gc=False):
    """A launched plan, and the live jobs behind its plain numbers."""

    plan: Plan
    jobs: Sequence[Job]
    repeat: int
    launched_at: float
    chunks: tuple[Chunk, ...] | Singles
    paused_s: float = 0.0
    paused_at: float | None = None
    activation_bytes: int = 0
    is_stopping: bool = False

    def seen(self, now: float) -> Flying:
        """As policies see it."""
        until = now if self.paused_at is None else self.paused_at
        ran_s = until - self.launched_at - self.paused_s
        plan = self.plan
        return Flying(
            plan.id, plan.lane, self.chunks, ran_s, self.activation_bytes, self.is_stopping
        )


class Replica:
    """See the module's text. All methods are called on the loop's thread.

    `on_outputs` hears once a turn of everything it produced, as (request id, Output).
    """

    def __init__(
        self,
        config: ReplicaConfig,
        executor: Executor,
        policies: ReplicaPolicies,
        predictors: Predictors,
        *,
        log: Log,
        on_outputs: OnOutputs | None = None,
    ) -> None:
        self.config = config
        self.ledger: BlockLedger = ledger_of(
            config.swap, config.num_blocks, config.block_size, config.has_prefix_cache
        )
        self.max_context = min(executor.caps.max_context, config.num_blocks * config.block_size)
        self._executor = executor
        self._log = log
        self._on_outputs = on_outputs
        self._council = Council(
            policies, self.ledger, predictors, seed=config.seed, name=config.name,
            is_checked=config.is_checked,
        )  # fmt: skip
        learners = (*policies.all(), predictors.cost, predictors.lengths, predictors.programs)
        self._observers = [one.observe for one in learners if hasattr(one, "observe")]
        self._emit = self._emit_to_all if self._observers else log.emit
        self._interrupts: bool = getattr(policies.batch, "interrupts", False)
        self._roster = Roster(
            config.name,
            self.ledger,
            self._emit,
            max_context=self.max_context,
            canvas=executor.caps.canvas,
        )
        # Beside a plan that is suspended or in another lane nobody may share what it has not written yet.
        self._names_ahead = executor.caps.max_lanes == 1 and not self._interrupts
        self._briefing = Briefing(
            self.ledger, executor.caps.num_layers, names_ahead=self._names_ahead
        )
        self._swap: Swap | None = None
        if config.swap.host_blocks:
            assert executor.caps.host_blocks >= config.swap.host_blocks, "no such host memory"
            self._swap = Swap(config.swap, self.ledger, executor.caps.link)
        self._inbox: list[Arrival | str | Completion] = []
        self._num_arriving = 0
        self._flights: dict[PlanId, Flight] = {}
        self._suspended: dict[PlanId, Flight] = {}
        self._step_s = 0.0
        self._is_poked = False
        self._is_draining = False
        self._is_stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Future[None] | None = None
        self._drained: list[asyncio.Future[None]] = []
        executor.listen(self._put)

    # ------------------------------------------------------------------ what others call

    def submit(self, request: Request, *, every_token: bool = True) -> None:
        """Take a request. Raises ContextTooLong, Overloaded or Draining; then nothing was taken."""
        try:
            self._refuse_if_needed(request)
        except (ContextTooLong, Overloaded, Draining) as error:
            name = type(error).__name__
            refused = Refused(
                at=loop_now(),
                who=self.config.name,
                request=request.id,
                code=name,
                why=error.message,
            )
            self._log.emit(refused)
            raise
        self._num_arriving += request.n
        self._put((request, every_token))

    def cancel(self, request_id: str) -> None:
        """Stop all answers of a request; unknown ids (already ended) are ignored."""
        self._put(request_id)

    def report(self) -> Report:
        waiting = self._roster.waiting
        return Report(
            replica=self.config.name,
            at=loop_now(),
            is_draining=self._is_draining,
            num_running=len(self._roster.running),
            num_waiting=len(waiting) + self._num_arriving,
            waiting_tokens=sum(job.todo for job in waiting),
            free_blocks=self.ledger.free,
            total_blocks=self.ledger.total,
            block_size=self.config.block_size,
            max_context=self.max_context,
            step_s=self._step_s,
        )

    @property
    def is_idle(self) -> bool:
        return not (self._inbox or self._flights) and self._roster.is_empty

    async def run(self) -> None:
        """Return when stopped; raise what a turn raised (a bug here or in a policy, or a broken law)."""
        self._end = asyncio.get_running_loop().create_future()
        await self._end

    async def drain(self) -> None:
        """Refuse new requests and return when all that were taken have ended, or the replica has."""
        self._is_draining = True
        is_over = self._is_stopped or (self._end is not None and self._end.done())
        if not self.is_idle and not is_over:
            drained: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._drained.append(drained)
            await drained

    async def stop(self) -> None:
        """Abort what runs, let the executor go, end run()."""
        self._is_stopped = True
        for plan in (*self._flights, *self._suspended):
            self._executor.abort(plan)
        await self._executor.stop()
        if self._end is not None and not self._end.done():
            self._end.set_result(None)
        self._tell_drained()

    def check(self) -> None:
        """Recompute all invariants; AssertionError says which one is broken."""
        self.ledger.check()
        self._roster.check()
        if self._swap is not None:
            self._swap.check()
        flying: dict[int, int] = {}
        for flight in (*self._flights.values(), *self._suspended.values()):
            for work in flight.plan.work:
                flying[work.seq] = flying.get(work.seq, 0) + work.tokens
        for job in self._roster.running:
            assert job.in_flight == flying.get(job.seq, 0), f"in_flight of job {job.seq} is off"

    # ------------------------------------------------------------------ turns

    def _refuse_if_needed(self, request: Request) -> None:
        if self._is_draining or self._is_stopped:
            raise Draining("this replica is shutting down", hint="send the request again elsewhere")
        if request.prompt.num_tokens >= self.max_context:
            raise ContextTooLong(
                f"the prompt has {request.prompt.num_tokens} tokens; this replica holds at most "
                f"{self.max_context} tokens of prompt and answer together",
                hint="shorten the prompt",
                param="prompt",
            )
        bound = self.config.max_waiting
        queued = len(self._roster.waiting) + self._num_arriving
        if bound is not None and queued and queued + request.n > bound:
            raise Overloaded(
                f"{queued} answers wait already; the queue holds {bound}",
                hint="try again in a moment",
                retry_after_s=max(1.0, self._step_s * STEPS_UNTIL_RETRY),
            )

    def _put(self, item: Arrival | str | Completion) -> None:
        self._inbox.append(item)
        if not self._is_poked:
            self._poke()

    def _poke(self) -> None:
        self._is_poked = True
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._turn_or_fail)

    def _turn_or_fail(self) -> None:
        self._is_poked = False
        try:
            assert self._loop is not None
            self.turn(self._loop.time())
        except BaseException as error:  # the outermost loop: whoever awaits run() gets it
            if self._end is None or self._end.done():
                raise
            self._end.set_exception(error)
            self._tell_drained()

    def turn(self, now: float) -> None:
        """Apply the inbox, step if a lane is idle, tell callers."""
        if self._is_stopped:
            return
        inbox, self._inbox = self._inbox, []
        self._num_arriving = 0
        for item in inbox:
            if isinstance(item, Done):
                self._apply_done(now, item)
            elif isinstance(item, tuple):
                self._roster.arrive(now, *item)
            elif isinstance(item, str):
                self._apply_cancel(now, item)
            elif isinstance(item, Moved):
                self._apply_moved(now, item)
            else:
                assert isinstance(item, Yielded)
                self._apply_yielded(now, item)
        for plan, flight in self._flights.items():
            if flight.repeat > 1:
                self._executor.interrupt(plan, "step")
        has_idle_lane = len(self._flights) < self._executor.caps.max_lanes
        if (has_idle_lane or self._interrupts) and not self._roster.is_empty:
            self._step(now)
        self._settle()

    def _settle(self) -> None:
        outputs = self._roster.outputs
        if outputs:
            self._roster.outputs = []
            if self._on_outputs is not None:
                self._on_outputs(tuple(outputs))
        if self.config.is_checked:
            self.check()
        if self._inbox or self._flights or not self._roster.is_empty:
            return
        closed = self._briefing.take_closed()
        if closed:
            self._executor.close_jobs(closed)
        self._tell_drained()

    def _tell_drained(self) -> None:
        for drained in self._drained:
            if not drained.done():
                drained.set_result(None)
        self._drained.clear()

    def _emit_to_all(self, event: Event) -> None:
        self._log.emit(event)
        for observe in self._observers:
            observe(event)

    # ------------------------------------------------------------------ inputs

    def _apply_cancel(self, now: float, request_id: str) -> None:
        jobs = self._roster.jobs_of(request_id)
        if not jobs:
            return
        self._emit(Cancelled(at=now, who=self.config.name, request=request_id))
        for job in jobs:
            job.is_cancelled = True
            if not job.in_flight and job.status != "in_transfer":
                self._finish(now, job, "cancelled")
        for plan, flight in list(self._suspended.items()):
            if all(job.is_cancelled for job in flight.jobs):
                del self._suspended[plan]
                self._abort(now, flight)

    def _abort(self, now: float, flight: Flight) -> None:
        """Give up a plan of which nobody wants anything any more."""
        self._executor.abort(flight.plan.id)
        for work, job in zip(flight.plan.work, flight.jobs, strict=True):
            job.in_flight -= work.tokens
            self._finish(now, job, "cancelled")

    def _finish(
        self,
        now: float,
        job: Job,
        reason: FinishReason,
        sampled: Sampled = NOTHING,
        error: str | None = None,
    ) -> None:
        self._briefing.ended(job)
        self._roster.finish(now, job, reason, sampled, error)
        if self._swap is not None:
            self._swap.forget(job.seq)

    def _apply_moved(self, now: float, moved: Moved) -> None:
        assert self._swap is not None
        transfer, job, _ = self._swap.moved(moved.transfer)
        transferred = Transferred(
            at=now,
            who=self.config.name,
            transfer=transfer.id,
            seq=transfer.seq,
            is_out=transfer.is_out,
            num_blocks=transfer.num_blocks,
            num_runs=len(transfer.runs),
        )
        self._emit(transferred)
        if transfer.is_out or job.status == "ended":
            return
        self._briefing.fetched(job)
        if job.status == "in_transfer":
            self._roster.join(job)
            self._council.ask_again()
            if job.is_cancelled:
                self._finish(now, job, "cancelled")

    def _apply_yielded(self, now: float, yielded: Yielded) -> None:
        flight = self._flights.pop(yielded.plan)
        flight.paused_at, flight.activation_bytes = now, yielded.activation_bytes
        suspended = Suspended(
            at=now,
            who=self.config.name,
            plan=yielded.plan,
            activation_bytes=yielded.activation_bytes,
        )
        self._emit(suspended)
        self._suspended[yielded.plan] = flight
        if not self._interrupts:
            self._resume(now, yielded.plan)  # somebody else interrupted it
        elif all(job.is_cancelled for job in flight.jobs):
            self._abort(now, self._suspended.pop(yielded.plan))

    def _interrupt(self, plan: PlanId) -> None:
        flight = self._flights[plan]
        if not flight.is_stopping:
            flight.is_stopping = True
            self._executor.interrupt(plan, self._executor.caps.yield_grain)

    def _resume(self, now: float, plan: PlanId) -> None:
        flight = self._suspended.pop(plan)
        assert flight.paused_at is not None, "it is suspended"
        flight.paused_s += now - flight.paused_at
        flight.paused_at, flight.activation_bytes, flight.is_stopping = None, 0, False
        self._flights[plan] = flight
        self._executor.resume(plan)

    def _apply_done(self, now: float, done: Done) -> None:
        flight = self._flights.pop(done.plan)
        self._emit_completed(now, done)
        self._step_s = (done.ends[-1] - flight.launched_at) / done.steps_run
        if isinstance(done, Counted):
            self._apply_counts(now, flight, done)
        else:
            self._apply_outputs(now, flight, done)

    def _apply_counts(self, now: float, flight: Flight, done: Counted) -> None:
        """`_apply_outputs` for bare counts, which need no looking into."""
        steps, extra = done.steps_run, done.steps_run - 1
        first, end = done.ends[0], done.ends[-1]
        if extra:
            # Before anybody ends: single steps would have taken these blocks while all were running.
            self.ledger.extend_each(flight.jobs, steps)
        others, jobs, counts = flight.plan.work, flight.jobs, iter(done.counts)
        if isinstance(others, Decodes):
            num = len(others.seqs)
            self._apply_decodes(now, jobs[:num], done)
            others, jobs, counts = others.others, jobs[num:], iter(done.counts[num:])
        for work, job in zip(others, jobs, strict=True):
            tokens = work[2]
            job.in_flight -= tokens
            self._advance(job, work, extra)
            if work[3]:
                is_stop = next(counts)[2]
                job.num_output += steps
                job.last_token_at = end
                if job.first_token_at is None:
                    job.first_token_at = first
                is_over = is_stop or job.is_cancelled or job.num_output >= job.max_tokens
                if not (is_over or job.is_streamed):
                    continue
                sampled = Sampled(job.seq, steps, (), is_stop)
            else:
                sampled = NOTHING
            reason = self._reason_to_end(job, sampled, None)
            if reason is not None:
                self._finish(now, job, reason, sampled)
            elif sampled.tokens:
                self._roster.tell(job, sampled)

    def _advance(self, job: Job, work: Work, extra: int, tokens: int = 0) -> None:
        """Positions are computed once they have passed the last layer; on a canvas none is before the answer ends."""
        if isinstance(job, CanvasJob):
            job.go_on(tokens)
            return
        if work.layers is not None and work.layers[1] < self._executor.caps.num_layers:
            job.carried = (work.tokens, work.layers[1])
        else:
            job.computed += work.tokens + extra
            job.carried = None
            if not self._names_ahead:
                self.ledger.register(job, job.computed)

    def _apply_decodes(self, now: float, jobs: Sequence[Job], done: Counted) -> None:
        """Of the part that is written by columns, most of nearly every step: each job got a token a step."""
        steps, end = done.steps_run, done.ends[-1]
        for job, (seq, _, is_stop, _) in zip(jobs, done.counts, strict=False):
            job.in_flight -= 1
            job.computed += steps
            job.num_output = written = job.num_output + steps
            job.last_token_at = end
            if job.first_token_at is None:
                job.first_token_at = done.ends[0]
            if is_stop or written >= job.max_tokens or job.is_cancelled:
                sampled = Sampled(seq, steps, (), is_stop)
                reason = self._reason_to_end(job, sampled, None)
                assert reason is not None, "cancelled, stopped or at its length"
                self._finish(now, job, reason, sampled)
            elif job.is_streamed:
                self._roster.tell(job, Sampled(seq, steps))

    def _apply_outputs(self, now: float, flight: Flight, done: Done) -> None:
        found, extra = {sampled.seq: sampled for sampled in done.outputs}, done.steps_run - 1
        errors = self._errors(flight, done)
        if extra:
            self.ledger.extend_each(flight.jobs, done.steps_run)
        for work, job in zip(flight.plan.work, flight.jobs, strict=True):
            job.in_flight -= work.tokens
            sampled = found.get(work.seq, NOTHING)
            error = errors.get(work.seq)
            if error is None:
                self._advance(job, work, extra, sampled.tokens)
            if sampled.filled and self.config.has_prefix_cache and not job.request.scores_prompt:
                job.hashes.extend(sampled.filled)
                self.ledger.register(job, job.computed)
            if sampled.tokens:
                job.num_output += sampled.tokens
                job.last_token_at = done.ends[-1]
                if job.first_token_at is None:
                    job.first_token_at = done.ends[0]
            reason = self._reason_to_end(job, sampled, error)
            if reason is not None:
                self._finish(now, job, reason, sampled, error)
            elif sampled.tokens or sampled.prompt_logprobs:
                self._roster.tell(job, sampled)

    def _errors(self, flight: Flight, done: Done) -> dict[int, str]:
        """Jobs that end with an error, and why.

        Full blocks are registered when their step is planned, so later chunks of a failed step may share blocks that
        were never written: these are forgotten, and whoever shares them has failed as well.
        """
        errors = {one.seq: one.error for one in done.outputs if one.error is not None}
        if not errors and done.error is None:
            return errors
        lost: set[int] = set()
        for work, job in zip(flight.plan.work, flight.jobs, strict=True):
            if done.error is not None:
                errors[work.seq] = done.error
            elif work.seq not in errors and not lost.isdisjoint(self.ledger.tables[work.seq]):
                errors[work.seq] = SHARED_FAILURE
            if work.seq in errors:
                lost |= self.ledger.disown(job, work.start)
        return errors

    def _emit_completed(self, now: float, done: Done) -> None:
        told: tuple[tuple[int, int, bool, tuple[str, ...]], ...]
        errors: tuple[tuple[int, str], ...] = ()
        if isinstance(done, Counted):
            told = done.counts
        else:
            told = tuple(
                [
                    (one.seq, one.tokens, one.is_stop, tuple([known.hex() for known in one.filled]))
                    for one in done.outputs
                ]
            )
            errors = tuple([(one.seq, one.error) for one in done.outputs if one.error is not None])
        self._emit(
            Completed(
                at=now,
                who=self.config.name,
                plan=done.plan,
                steps_run=done.steps_run,
                ends=done.ends,
                outputs=told,
                errors=errors,
                error=done.error,
            )
        )

    @staticmethod
    def _reason_to_end(job: Job, sampled: Sampled, error: str | None) -> FinishReason | None:
        if error is not None:
            return "error"
        if job.is_cancelled:
            return "cancelled"
        if sampled.is_stop:
            return "stop"
        if job.num_output >= job.max_tokens:
            return "length"
        if job.request.kind != "generate" and job.computed >= job.num_prompt:
            return "stop"
        return None

    # ------------------------------------------------------------------ the step

    def _step(self, now: float) -> None:
        roster, caps = self._roster, self._executor.caps
        verdict = self._council.decide(
            now,
            running=roster.running,
            waiting=roster.waiting,
            caps=caps,
            flying=_seen(self._flights, now),
            suspended=_seen(self._suspended, now),
        )
        decision = verdict.decision
        for name in decision.interrupt:
            self._interrupt(PlanId(name))
        for name in decision.resume:
            self._resume(now, PlanId(name))
        busy = {flight.plan.lane for flight in self._flights.values()}
        if decision.evicted:
            self._evict(verdict)
        for admitted in decision.admitted:
            roster.start(now, admitted)  # type: ignore[arg-type]
        lanes: Sequence[Lane] = decision.batch.lanes
        if self._swap is not None and decision.admitted:
            lanes = self._fetch(self._swap, verdict)
        places = (place for place in range(caps.max_lanes) if place not in busy)
        has_launched = False
        for lane, chunks in zip(lanes, verdict.chunks, strict=True):
            if chunks:
                place = next(places, None)
                assert place is not None, "the batch policy planned for a busy lane"
                self._launch(now, verdict, place, lane, chunks)
                has_launched = True
        if not has_launched:
            self._emit_stepped(now, verdict, None, 1, ())
        for refused, why in verdict.refused:
            job: Job = refused  # type: ignore[assignment]
            self._briefing.ended(job)
            told = why or "the admission policy refuses this request"
            roster.finish(now, job, "error", NOTHING, told, "BadRequest")
            if self._swap is not None:
                self._swap.forget(job.seq)
        if not self._flights and not roster.is_empty:
            if decision.evicted or verdict.refused or decision.resume:
                self._poke()
                return
            assert self._swap is not None and self._swap.is_moving, (
                f"nothing runs and nothing was planned: {verdict.why or 'no reason given'}"
            )

    def _evict(self, verdict: Verdict) -> None:
        offloaded = []
        for eviction in verdict.decision.evicted:
            job: Job = eviction.item  # type: ignore[assignment]
            assert eviction.to == "drop" or eviction.to == "host", "there are no peers to evict to"
            if eviction.to == "host" and self._swap is not None:
                transfer = self._swap.put(job)
                if transfer is not None:
                    cast(MovingExecutor, self._executor).transfer(transfer)
                if job.seq in self.ledger.copies:
                    offloaded.append(job.seq)
            self._roster.preempt(job, is_offloaded=job.seq in self.ledger.copies)
            self._briefing.preempted(job)
        verdict.offloaded = tuple(offloaded)

    def _fetch(self, swap: Swap, verdict: Verdict) -> Sequence[Lane]:
        """Begin to fetch the blocks of admitted jobs; the lanes, without jobs whose blocks come later."""
        admitted: Sequence[Job] = verdict.decision.admitted  # type: ignore[assignment]
        lanes = verdict.decision.batch.lanes
        coming = [job for job in admitted if swap.num_to_fetch(job)]
        for job in admitted:
            swap.settle(job)
        if not coming:
            return lanes
        planned = {one.job.seq: one for lane in lanes for one in lane.chunks}
        chunks = [planned.get(job.seq) for job in coming]
        waits = all([one is not None and one.layers is None for one in chunks])
        num_tokens = sum([one.tokens for one in planned.values()])
        waits = waits and swap.waits(coming, num_tokens, self._step_s)
        for job, chunk in zip(coming, chunks, strict=True):
            self._briefing.fetching(job)
            transfer = swap.fetch(job, 0 if chunk is None else chunk.tokens, waits)
            cast(MovingExecutor, self._executor).transfer(transfer)
            if not waits:
                self._roster.wait_for_blocks(job)
        verdict.loaded = tuple([job.seq for job in coming])
        if waits:
            return lanes
        late = set(verdict.loaded)
        verdict.chunks = [
            tuple([one for one in told if one[0] not in late]) for told in verdict.chunks
        ]
        return [without(lane, late) for lane in lanes]

    def _partial(self, plan: Plan) -> tuple[int, ...]:
        """Jobs whose chunk does not reach the last layer."""
        caps, work = self._executor.caps, plan.work
        if not caps.has_layer_ranges:
            return ()
        others = work.others if isinstance(work, Decodes) else work
        return tuple([one.seq for one in others if one.layers and one.layers[1] < caps.num_layers])

    def _launch(self, now: float, verdict: Verdict, place: int, lane: Lane, chunks: Chunks) -> None:
        running, waiting = len(self._roster.running.jobs), len(self._roster.waiting.jobs)
        plan, jobs, left = self._briefing.plan(
            place, lane, verdict.decision.batch, running, waiting
        )
        most = min(left, verdict.stable_for, self._executor.caps.max_repeat)
        if self._swap is not None and self._swap.is_moving:
            most = 1  # which blocks later steps take is known only when they are over
        repeat = self._repeat(jobs, most) if most > 1 and len(jobs) == running else 1
        self._flights[plan.id] = Flight(plan, jobs, repeat, now, lane.chunks)
        self._emit_stepped(now, verdict, plan, repeat, chunks)
        self._executor.launch(plan, repeat)

    def _repeat(self, jobs: Sequence[Job], most: int) -> int:
        """How many of `most` decode steps can run as one: as many as fit in memory."""
        size, free = self.ledger.block_size, self.ledger.free
        if (most // size + 1) * len(jobs) <= free:
            return most
        rooms = [self.ledger.held(job) * size - job.computed for job in jobs]
        fits, over = (
            1,
            most + 1,
        )  # `fits` steps fit in memory; `over` do not, or are too many anyway
        while over - fits > 1:
            middle = (fits + over) // 2
            need = sum(-(-(middle - room) // size) for room in rooms if middle > room)
            fits, over = (middle, over) if need <= free else (fits, middle)
        return fits

    def _emit_stepped(
        self, now: float, verdict: Verdict, plan: Plan | None, repeat: int, chunks: Chunks
    ) -> None:
        decision = verdict.decision
        self._emit(
            Stepped(
                at=now,
                who=self.config.name,
                plan=None if plan is None else plan.id,
                lane=0 if plan is None else plan.lane,
                digest=verdict.digest,
                repeat=repeat,
                chunks=chunks,
                admitted=tuple([job.seq for job in decision.admitted]),
                evicted=tuple([eviction.item.seq for eviction in decision.evicted]),
                num_running=len(self._roster.running.jobs),
                num_waiting=len(self._roster.waiting.jobs),
                free_blocks=self.ledger.free,
                why=verdict.why,
                partial=() if plan is None else self._partial(plan),
                interrupted=decision.interrupt,
                resumed=decision.resume,
                offloaded=verdict.offloaded,
                loaded=verdict.loaded,
            )
        )


def _seen(flights: dict[PlanId, Flight], now: float) -> Sequence[Flying]:
    return [flight.seen(now) for flight in flights.values()] if flights else ()
