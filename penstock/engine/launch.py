"""What the policies decided happens: evictions, admissions, copies, plans.

**One step is one transaction.** `order` ranks the waiting, `batch` plans on forks of the ledger (asking `admit` and
`evict` on the way), and the decision is applied in this order: evictions; cached prefixes of all admitted jobs are
pinned; then chunk by chunk, blocks are taken and full ones registered; launch.

**Steps that repeat.** When the policies declare their decision stable and all chunks are single tokens, up to
`caps.max_repeat` steps are launched as one. The number is bounded by the next answer that reaches its length and by the
blocks left; an input interrupts it at the next step boundary. Blocks of the repeated positions are taken when the
executor says how many steps it ran, which is the same number at the same moment as if it had stepped.

**Nobody is admitted** while tiers ask for that (engine.tiers): the policies are told that nobody waits.

**Blocks that move.** With host memory (`ReplicaConfig.swap`) an eviction to "host" copies a job's blocks there, and it
gets them back when it is admitted again (engine.swap). Either the plan waits for the copy, or the job is left out of it
and joins the running when the copy is there; until then no policy sees it. Transfers that end are inputs (Transferred).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from msgspec import UNSET

from penstock.core.events import Stepped
from penstock.core.plans import Decodes, Encoding, Plan
from penstock.core.ports import MovingExecutor
from penstock.core.types import Caps, Job, PlanId
from penstock.core.views import Lane, Singles
from penstock.engine.flights import Flight, Flights, seen
from penstock.engine.joblist import JobList
from penstock.engine.ledger import BlockLedger
from penstock.engine.lending_ledger import LendingLedger
from penstock.engine.parts import Parts
from penstock.engine.roster import NOTHING
from penstock.engine.swap import Swap, without
from penstock.engine.turn import Chunks, Council, Verdict

NOBODY = JobList(is_live=False)


class Launch:
    """Asks the council and applies what it says."""

    def __init__(self, parts: Parts, flights: Flights, council: Council) -> None:
        self._parts, self._flights, self._council = parts, flights, council
        self._ledger, self._roster, self._swap = parts.ledger, parts.roster, parts.swap
        self._executor, self._tiers = parts.executor, parts.tiers
        self._narrow = _narrow(parts.executor.caps, parts.ledger)

    def step(self, now: float) -> bool:
        """One step of decisions. False: nothing runs now, and they are to be asked again at once."""
        roster, flights = self._roster, self._flights
        caps = self._narrow or self._executor.caps
        waiting = roster.waiting
        if self._tiers is not None and self._tiers.is_pressed:
            if not (roster.running.jobs or flights.suspended):
                return True
            waiting = NOBODY
        if not (flights.running or flights.suspended):
            if self._council.goes_on(roster.running, waiting):
                self._decode_on(now)
                return True
        verdict = self._council.decide(
            now,
            running=roster.running,
            waiting=waiting,
            caps=caps,
            flying=seen(self._flights.running, now),
            suspended=seen(self._flights.suspended, now),
        )
        decision = verdict.decision
        for name in decision.interrupt:
            self._flights.interrupt(PlanId(name))
        for name in decision.resume:
            self._flights.resume(now, PlanId(name))
        busy = {flight.plan.lane for flight in self._flights.running.values()}
        if decision.evicted:
            self._evict(verdict)
        for admitted in decision.admitted:
            roster.start(now, admitted)  # type: ignore[arg-type]
        lanes: Sequence[Lane] = decision.batch.lanes
        if self._swap is not None and decision.admitted:
            lanes = self._fetch(now, self._swap, verdict)
        free = [place for place in range(caps.max_lanes) if place not in busy]
        if not self._launch_all(now, verdict, lanes, free):
            self._emit_stepped(now, verdict, None, 1, ())
        for refused, why in verdict.refused:
            told = why or "the admission policy refuses this request"
            self._parts.finish(now, refused, "error", NOTHING, told, "BadRequest")  # type: ignore[arg-type]
        if self._flights.running or roster.is_empty:
            return True
        if decision.evicted or verdict.refused or decision.resume:
            return False
        is_moving = roster.held or roster.stand_ins or (self._swap and self._swap.is_moving)
        is_lent = isinstance(self._ledger, LendingLedger) and bool(self._ledger.lent)
        assert is_moving or is_lent, (
            f"nothing runs and nothing was planned: {verdict.why or 'no reason given'}"
        )
        return True

    def _launch_all(
        self, now: float, verdict: Verdict, lanes: Sequence[Lane], free: Sequence[int]
    ) -> bool:
        """Into the lanes that are free; whether there was anything to launch."""
        images: tuple[Encoding, ...] = ()
        if self._roster.images.jobs:
            images = self._roster.images.begin(verdict.decision, lanes)
            if images and not any(verdict.chunks):  # a step of images alone
                lanes, verdict.chunks = (Lane(()),), [()]
        places, has_launched = iter(free), False
        for lane, chunks in zip(lanes, verdict.chunks, strict=True):
            if chunks or images:
                place = next(places, None)
                assert place is not None, "the batch policy planned for a busy lane"
                self._launch(now, verdict, place, lane, chunks, images=images)
                has_launched, images = True, ()
        return has_launched

    def _evict(self, verdict: Verdict) -> None:
        offloaded = []
        for eviction in verdict.decision.evicted:
            job: Job = eviction.item  # type: ignore[assignment]
            assert eviction.to == "drop" or eviction.to == "host", "there are no peers to evict to"
            if eviction.to == "host" and self._swap is not None:
                transfer = self._swap.put(job)
                if transfer is not None:
                    cast(MovingExecutor, self._executor).transfer(transfer)
                if job.seq in self._ledger.copies:
                    offloaded.append(job.seq)
            self._roster.preempt(job, is_offloaded=job.seq in self._ledger.copies)
            if job.status == "waiting":
                self._roster.images.lose(job)
            self._parts.briefing.preempted(job)
        verdict.offloaded = tuple(offloaded)

    def _fetch(self, now: float, swap: Swap, verdict: Verdict) -> Sequence[Lane]:
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
        waits = waits and swap.waits(coming, num_tokens, self._parts.step_s)
        for job, chunk in zip(coming, chunks, strict=True):
            self._parts.briefing.fetching(job)
            transfer = swap.fetch(job, 0 if chunk is None else chunk.tokens, waits)
            if self._tiers is not None:
                self._tiers.begin(now)  # what lay in these blocks leaves before they are written to
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

    def _decode_on(self, now: float) -> None:
        """One token of every running job, which has been decided: nobody is asked and nothing told but the launch."""
        parts, jobs = self._parts, tuple(self._roster.running.jobs)
        plan, left = parts.briefing.decodes(jobs)
        repeat = self._num_steps(jobs, left)
        self._flights.running[plan.id] = Flight(plan, jobs, repeat, now, Singles(jobs))
        if self._tiers is not None:
            self._tiers.begin(now)
        parts.emit_step(
            Stepped(
                at=now,
                who=parts.name,
                plan=plan.id,
                lane=0,
                digest="",
                repeat=repeat,
                chunks=tuple([(job.seq, 1) for job in jobs]),
                admitted=(),
                evicted=(),
                num_running=len(jobs),
                num_waiting=len(self._roster.waiting.jobs),
                free_blocks=self._ledger.free,
            )
        )
        self._executor.launch(plan, repeat)

    def _launch(
        self,
        now: float,
        verdict: Verdict,
        place: int,
        lane: Lane,
        chunks: Chunks,
        *,
        images: tuple[Encoding, ...],
    ) -> None:
        running, waiting = len(self._roster.running.jobs), len(self._roster.waiting.jobs)
        plan, jobs, left = self._parts.briefing.plan(
            place, lane, verdict.decision.batch, running, waiting
        )
        most = min(left, verdict.stable_for) if len(jobs) == running and not images else 1
        if images:
            plan.images = images
        repeat = self._num_steps(jobs, most) if most > 1 else 1
        self._flights.running[plan.id] = Flight(plan, jobs, repeat, now, lane.chunks)
        self._emit_stepped(now, verdict, plan, repeat, chunks)
        if self._tiers is not None:
            self._tiers.begin(now)
        self._executor.launch(plan, repeat)

    def _num_steps(self, jobs: Sequence[Job], most: int) -> int:
        """How many of `most` decode steps can run as one: as many as fit in memory."""
        most = min(most, self._executor.caps.max_repeat)
        if most == 1 or (self._swap is not None and self._swap.is_moving):
            return 1  # which blocks later steps take is known only when copies are over
        size, free = self._ledger.block_size, self._ledger.free
        if (most // size + 1) * len(jobs) <= free:
            return most
        rooms = [self._ledger.held(job) * size - job.computed for job in jobs]
        fits, over = 1, most + 1  # so many fit; so many do not, or are too many anyway
        while over - fits > 1:
            middle = (fits + over) // 2
            need = sum(-(-(middle - room) // size) for room in rooms if middle > room)
            fits, over = (middle, over) if need <= free else (fits, middle)
        return fits

    def _emit_stepped(
        self, now: float, verdict: Verdict, plan: Plan | None, repeat: int, chunks: Chunks
    ) -> None:
        decision = verdict.decision
        self._parts.emit_step(
            Stepped(
                at=now,
                who=self._parts.name,
                plan=None if plan is None else plan.id,
                lane=0 if plan is None else plan.lane,
                digest=verdict.digest,
                repeat=repeat,
                chunks=chunks,
                admitted=tuple([job.seq for job in decision.admitted]),
                evicted=tuple([eviction.item.seq for eviction in decision.evicted]),
                num_running=len(self._roster.running.jobs),
                num_waiting=len(self._roster.waiting.jobs),
                free_blocks=self._ledger.free,
                why=verdict.why,
                partial=() if plan is None else self._partial(plan),
                interrupted=decision.interrupt,
                resumed=decision.resume,
                offloaded=verdict.offloaded,
                loaded=verdict.loaded,
                share=1.0 if plan is None else plan.share,
                images=UNSET
                if plan is None or not plan.images
                else tuple([(seq, len(tokens)) for seq, tokens in plan.images]),
            )
        )


def _narrow(caps: Caps, ledger: BlockLedger) -> Caps | None:
    """For a replica that lends: what a step computes must fit into what it keeps for its own; None for others."""
    if not isinstance(ledger, LendingLedger):
        return None
    most = min(caps.max_batch_tokens, ledger.working * ledger.block_size)
    return replace(caps, max_batch_tokens=most)
