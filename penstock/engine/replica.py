"""One replica: it turns requests into tokens, step by step.

    inputs (requests, cancels, completions) --> inbox
    turn:  take the inbox -> apply it -> if a lane is idle: decide, apply the decision, launch -> tell callers

A turn runs whenever something came in, as one callback of the loop, with one `now`. It is the only place where
state changes, so nothing here waits and nothing interleaves. The same code runs under the wall clock and in
virtual time; what is real is only the executor. Its pieces, which share `engine.parts`: what completes
(engine.outcomes), what launches (engine.launch), plans under way (engine.flights).

**What is logged, and when** (this is what makes `replay` possible). All events of a turn carry its `now`. First the
inputs, in the order in which they are applied: Arrived, Cancelled, Completed (each followed by the Finished it
causes). Then, if a lane was idle and there was work, exactly one Stepped per call of the policies, with `plan` None
when nothing could be launched, before the executor hears of the plan. Whoever feeds the inputs of a log at their
instants, in order, and lets a turn run before going past a Stepped, makes the policies see the very same views.

**Cancelling** a job that is part of a running plan frees its blocks when that plan, or the copy of
its blocks, ends, otherwise at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.clock import now as loop_now
from penstock.core.errors import BadRequest, ContextTooLong, Draining, Overloaded
from penstock.core.events import Cancelled, Refused
from penstock.core.messages import BlockNews
from penstock.core.moving import JobState
from penstock.core.plans import Adapted, Done, Filed, Moved, Yielded
from penstock.core.ports import Completion, Executor, Log
from penstock.core.types import Output, Report, Request, Role
from penstock.engine.block_news import NewsDesk
from penstock.engine.flights import Flights
from penstock.engine.joinings import Taking
from penstock.engine.launch import Launch
from penstock.engine.ledger import BlockLedger
from penstock.engine.loans import Borrowing
from penstock.engine.making import add_tiers, bringing_of, make_parts
from penstock.engine.moves import Moves, Order
from penstock.engine.outcomes import Outcomes
from penstock.engine.partings import Offering
from penstock.engine.parts import Ears
from penstock.engine.reports import Reporter, Tells
from penstock.engine.swap import Store, SwapConfig, ledger_of
from penstock.engine.tiers import news_of
from penstock.engine.turn import Council, Predictors, ReplicaPolicies

OnOutputs = Callable[[tuple[tuple[str, Output], ...]], None]
Arrival = tuple[Request, bool, JobState | None]
STEPS_UNTIL_RETRY = 100  # a full queue is tried again after about so many steps


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """What a replica is made with. `max_waiting` None = no bound on its queue.

    `max_open`: answers it has at once, running or waiting; whoever comes beyond is turned away. None = no bound.
    `tells`: what its fleet wants to hear beside plain reports (engine.reports). `pull_share`: see engine.joinings.
    `is_checked`: hold every decision to its law and recompute all invariants after every turn (slow; for tests).
    """

    name: str = "replica-0"
    num_blocks: int
    block_size: int = 16
    has_prefix_cache: bool = True
    store: Store = "hash"
    max_waiting: int | None = None
    max_open: int | None = None
    seed: int = 0
    is_checked: bool = False
    swap: SwapConfig = SwapConfig()
    role: Role = "any"
    tells: tuple[Tells, ...] = ()
    pull_share: float | None = None


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
        self.role: Role = config.role  # whoever changes it lets its reports say so
        self.ledger: BlockLedger = ledger_of(
            config.swap, config.num_blocks, config.block_size, config.has_prefix_cache, config.store,
            lends=executor.caps.lends,
        )  # fmt: skip
        self.max_context = min(executor.caps.max_context, config.num_blocks * config.block_size)
        self._executor = executor
        self._log = log
        self._on_outputs = on_outputs
        learners = (*policies.all(), predictors.cost, predictors.lengths, predictors.programs)
        ears = Ears(learners, log)
        self._interrupts: bool = getattr(policies.batch, "interrupts", False)
        self._parts = parts = make_parts(
            config.name, self.ledger, executor, ears,
            swap=config.swap, max_context=self.max_context, interrupts=self._interrupts,
        )  # fmt: skip
        self._roster, self._briefing, self._swap = parts.roster, parts.briefing, parts.swap
        self._council = Council(
            policies, self.ledger, predictors, seed=config.seed, name=config.name,
            is_checked=config.is_checked,
        )  # fmt: skip
        self._bringing = bringing = bringing_of(parts, self._council, predictors, seed=config.seed)
        self._tiers = add_tiers(parts, self._council, bringing)
        self._flights = Flights(parts, self._interrupts)
        self._outcomes = Outcomes(
            parts, self._flights, config.has_prefix_cache, ask_again=self._council.ask_again
        )
        self._launch = Launch(parts, self._flights, self._council)
        self._reporter = Reporter(
            parts, self._flights, max_context=self.max_context,
            prompt_room=getattr(policies.batch, "max_tokens", None) or 1,
            head=self._council.head, tells=config.tells,
        )  # fmt: skip
        ask, share = self._council.ask_again, config.pull_share
        self._moves = Moves(parts, self._flights, bringing, ask, self._put, pull_share=share)
        self._inbox: list[Arrival | str | Completion | Order] = []
        self._num_arriving = 0
        self._is_poked = False
        self.is_draining = False  # whoever sets it back takes requests again
        self._is_stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Future[None] | None = None
        self._drained: list[asyncio.Future[None]] = []
        if "blocks" in config.tells:
            self.ledger.news = NewsDesk()
            if self._tiers is not None:
                self._tiers.store.tell_news()
        executor.listen(self._put)

    # ------------------------------------------------------------------ what others call

    def submit(
        self, request: Request, *, every_token: bool = True, state: JobState | None = None
    ) -> None:
        """Take a request; with a `state` its answer goes on from there.

        Raises BadRequest, ContextTooLong, Overloaded or Draining; then nothing was taken.
        """
        try:
            self._refuse_if_needed(request)
        except (BadRequest, ContextTooLong, Overloaded, Draining) as error:
            name = type(error).__name__
            who, why = self.config.name, error.message
            refused = Refused(at=loop_now(), who=who, request=request.id, code=name, why=why)
            self._log.emit(refused)
            raise
        self._num_arriving += request.n
        self._put((request, every_token, state))

    def move(self, order: Order) -> None:
        """Let a request go, take one in, or hear how that ended; see engine.moves. Raises Draining, ContextTooLong."""
        if isinstance(order, Taking) and order.request is not None:
            self._refuse_if_needed(order.request, is_moving=True)
        if isinstance(order, Borrowing) and self._moves.loans is not None:
            self._moves.loans.note(order)
        if isinstance(order, Offering) and not order.is_last:
            self._moves.partings.show(loop_now(), order)
        else:
            self._put(order)

    def cancel(self, request_id: str) -> None:
        """Stop all answers of a request; unknown ids (already ended) are ignored."""
        self._put(request_id)

    def report(self) -> Report:
        arriving: list[Request] = []
        if self._num_arriving:
            arriving = [item[0] for item in self._inbox if type(item) is tuple]
        report = self._reporter.report(loop_now(), arriving, is_draining=self.is_draining)
        report.role, report.brought = self.role, self._bringing.told
        if self._moves.loans is not None:
            report.lent_blocks, report.away_blocks = self._moves.loans.counts
        return report

    def news(self) -> BlockNews | None:
        """What its blocks hold since the last call, and what they no longer do; None = nobody asked, or nothing."""
        return news_of(self.ledger, self._tiers)

    def restart_news(self) -> None:
        """Somebody new listens."""
        self.ledger.news.restart()
        if self._tiers is not None:
            self._tiers.store.restart_news()

    def requests(self) -> tuple[str, ...]:
        """Ids of all that it holds, also of those that have just come."""
        coming = [item[0].id for item in self._inbox if isinstance(item, tuple)]
        return (*self._roster.request_ids(), *coming)

    @property
    def moves_jobs(self) -> bool:
        """Whether requests can leave for another replica, and come from one."""
        return self._executor.caps.moves_jobs

    @property
    def is_idle(self) -> bool:
        """Nothing runs or waits here, and nobody else's blocks are kept."""
        if self._inbox or self._flights.running or self._moves.is_lending:
            return False
        return self._roster.is_empty

    async def run(self) -> None:
        """Return when stopped; raise what a turn raised (a bug here or in a policy, or a broken law)."""
        self._end = asyncio.get_running_loop().create_future()
        await self._end

    async def drain(self) -> None:
        """Refuse new requests; return when all that were taken, and all loans, have ended, or the replica has."""
        self.is_draining = True
        is_over = self._is_stopped or (self._end is not None and self._end.done())
        if not self.is_idle and not is_over:
            drained: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._drained.append(drained)
            await drained

    async def stop(self) -> None:
        """Abort what runs, let the executor go, end run()."""
        self._is_stopped = True
        for plan in (*self._flights.running, *self._flights.suspended):
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
        if self._tiers is not None:
            self._tiers.check()
        self._flights.check(self._roster.running.jobs)

    # ------------------------------------------------------------------ turns

    def _refuse_if_needed(self, request: Request, *, is_moving: bool = False) -> None:
        if self.is_draining or self._is_stopped:
            raise Draining("this replica is shutting down", hint="send the request again elsewhere")
        if request.parts and not self._executor.caps.encodes:
            raise BadRequest(
                "this replica takes text only",
                hint="leave out the images; modelled replicas take them: executor.vision names a vision tower",
                param="messages",
            )
        room = self._roster.room_of(request.id)
        if request.prompt.num_tokens >= room:
            raise ContextTooLong(
                f"the prompt has {request.prompt.num_tokens} tokens; this replica holds at most "
                f"{room} tokens of prompt and answer together",
                hint="shorten the prompt",
                param="prompt",
            )
        if self._roster.has(request.id):
            raise Overloaded(
                f"this replica still holds a request named {request.id!r}",
                hint="try again in a moment",
                retry_after_s=max(1.0, self._parts.step_s * STEPS_UNTIL_RETRY),
            )
        bound = None if is_moving else self.config.max_waiting
        queued = len(self._roster.waiting) + self._roster.num_blocked + self._num_arriving
        most, running = self.config.max_open, len(self._roster.running)
        if most is not None and queued + running and queued + running + request.n > most:
            raise Overloaded(
                f"{queued + running} answers are under way here, and {most} may be",
                hint="send the request to another replica, or try again in a moment",
                retry_after_s=max(1.0, self._parts.step_s * STEPS_UNTIL_RETRY),
            )
        if bound is not None and queued and queued + request.n > bound:
            raise Overloaded(
                f"{queued} answers wait already; the queue holds {bound}",
                hint="try again in a moment",
                retry_after_s=max(1.0, self._parts.step_s * STEPS_UNTIL_RETRY),
            )

    def _put(self, item: Arrival | str | Completion | Order) -> None:
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
                self._outcomes.apply_done(now, item)
            elif isinstance(item, tuple):
                self._arrive(now, *item)
            elif isinstance(item, str):
                self._apply_cancel(now, item)
            elif isinstance(item, (Moved, Filed, Adapted)):
                self._outcomes.apply_copied(now, item)
            elif isinstance(item, Yielded):
                self._flights.apply_yielded(now, item)
            else:
                self._moves.apply(now, item)
            if self._roster.held or self._moves.is_waiting:
                self._moves.look(now)
        roster, running = self._roster, self._flights.running
        if roster.waiting.jobs:
            self._bring(now)
        if running:
            self._flights.hurry()
            can_step = self._interrupts or len(running) < self._executor.caps.max_lanes
        else:
            can_step = True
        if can_step and not (roster.is_empty or roster.is_all_blocked):
            if not self._launch.step(now):
                self._poke()
        self._settle()

    def _bring(self, now: float) -> None:
        """What those who wait could use of what lies elsewhere."""
        if self._tiers is not None:
            self._tiers.prepare(now)
        if self._moves.seeks.has_hints:
            self._moves.seeks.prepare(now)

    def _settle(self) -> None:
        outputs = self._roster.outputs
        if outputs:
            self._roster.outputs = []
            if self._on_outputs is not None:
                self._on_outputs(tuple(outputs))
        self._moves.answer()
        if self.config.is_checked:
            self.check()
        if self._inbox or self._flights.running or not self._roster.is_empty:
            return
        closed = self._briefing.take_closed()
        if closed:
            self._executor.close_jobs(closed)
        if self.is_idle:
            self._tell_drained()

    def _tell_drained(self) -> None:
        for drained in self._drained:
            if not drained.done():
                drained.set_result(None)
        self._drained.clear()

    # ------------------------------------------------------------------ inputs

    def _arrive(
        self, now: float, request: Request, every_token: bool, state: JobState | None
    ) -> None:
        jobs = self._roster.arrive(now, request, every_token, state)
        if state is not None:
            self._briefing.bring(jobs[0], state)

    def _apply_cancel(self, now: float, request_id: str) -> None:
        jobs = self._roster.jobs_of(request_id)
        if not jobs:
            return
        self._parts.emit(Cancelled(at=now, who=self.config.name, request=request_id))
        for job in jobs:
            job.is_cancelled = True
            if not job.in_flight and job.status != "in_transfer":
                self._parts.finish(now, job, "cancelled")
        self._flights.abort_unwanted(now)
