"""What came back changes jobs: tokens are counted, blocks get names, answers end, callers are told.

Nearly all completions of a modelled executor are bare counts (`Counted`), and nearly all of these are of decodes that
were written by columns: they have a way of their own, which does the same without looking into anything.

**Chunks through some layers.** Until a chunk has passed the last layer its positions are not computed, its blocks have
no name and nothing is sampled; `Job.carried` says how far it came.

**Guesses.** A chunk of the phase "verify" has computed as many positions as it yielded tokens: those of its last token
and of the right guesses. Blocks that only the wrong ones needed are given back; they never had a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.core.canvas import CanvasJob
from penstock.core.events import AdapterLoaded, Completed, Drafted, Transferred
from penstock.core.plans import Adapted, Counted, Decodes, Done, Filed, Moved, Sampled, Work
from penstock.core.types import FinishReason, Job
from penstock.engine.flights import Flight, Flights
from penstock.engine.parts import Parts
from penstock.engine.roster import NOTHING

SHARED_FAILURE = "a request that begins alike failed in the same step; send this one again"


class Outcomes:
    """Applies completions of plans, and of copies between device and host."""

    def __init__(
        self,
        parts: Parts,
        flights: Flights,
        has_prefix_cache: bool,
        *,
        ask_again: Callable[[], None],
    ) -> None:
        """`ask_again`: whoever joins the running outside a step makes the last decision void."""
        self._parts, self._flights, self._ask_again = parts, flights, ask_again
        self._ledger, self._roster = parts.ledger, parts.roster
        self._has_prefix_cache = has_prefix_cache

    def apply_done(self, now: float, done: Done) -> None:
        flight = self._flights.running.pop(done.plan)
        counted = done if isinstance(done, Counted) else None
        self._parts.emit_step(
            Completed(
                at=now,
                who=self._parts.name,
                plan=done.plan,
                steps_run=done.steps_run,
                ends=done.ends,
                outputs=self._told(now, done) if counted is None else counted.counts,
                errors=_errors_of(done) if counted is None else (),
                error=done.error,
            )
        )
        self._parts.step_s = (done.ends[-1] - flight.launched_at) / done.steps_run
        if flight.plan.images:
            self._roster.images.end(flight.plan.images, is_done=done.error is None)
        if counted is None:
            self._apply_outputs(now, flight, done)
        else:
            self._apply_counts(now, flight, counted)

    def _apply_counts(self, now: float, flight: Flight, done: Counted) -> None:
        """`_apply_outputs` for bare counts, which need no looking into."""
        steps, extra = done.steps_run, done.steps_run - 1
        first, end = done.ends[0], done.ends[-1]
        if extra:
            # Before anybody ends: single steps would have taken these blocks while all were running.
            self._ledger.extend_each(flight.jobs, steps)
        others, jobs, counts = flight.plan.work, flight.jobs, iter(done.counts)
        if isinstance(others, Decodes):
            if not others.others:
                self._apply_decodes(now, jobs, done)
                return
            num = len(others.seqs)
            self._apply_decodes(now, jobs[:num], done)
            others, jobs, counts = others.others, jobs[num:], iter(done.counts[num:])
        for work, job in zip(others, jobs, strict=True):
            tokens = work[2]
            job.in_flight -= tokens
            self._advance(job, work, extra, 1)
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
            reason = _reason_to_end(job, sampled, None)
            if reason is not None:
                self._parts.finish(now, job, reason, sampled)
            elif sampled.tokens:
                self._roster.tell(job, sampled)

    def _advance(self, job: Job, work: Work, extra: int, tokens: int = 0) -> None:
        """Positions are computed once they have passed the last layer; on a canvas none is before the answer ends."""
        if isinstance(job, CanvasJob):
            job.go_on(tokens)
            return
        if work.phase == "verify":
            job.computed += tokens
            if tokens < work.tokens:
                self._parts.briefing.verified(job)
        elif work.layers is not None and work.layers[1] < self._parts.executor.caps.num_layers:
            job.carried = (work.tokens, work.layers[1])
            return
        else:
            job.computed += work.tokens + extra
            job.carried = None
        if not self._parts.names_ahead:
            self._name(job)

    def _name(self, job: Job) -> None:
        """What is computed gets its names; a store may know it already, as other blocks, and the job takes these."""
        if self._parts.briefing.is_unproven(job.seq):
            return
        if self._ledger.register(job, job.computed):
            self._parts.briefing.retell(job)

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
                reason = _reason_to_end(job, sampled, None)
                assert reason is not None, "cancelled, stopped or at its length"
                self._parts.finish(now, job, reason, sampled)
            elif job.is_streamed:
                self._roster.tell(job, Sampled(seq, steps))

    def _apply_outputs(self, now: float, flight: Flight, done: Done) -> None:
        found, extra = {sampled.seq: sampled for sampled in done.outputs}, done.steps_run - 1
        errors = self._errors(flight, done)
        if extra:
            self._ledger.extend_each(flight.jobs, done.steps_run)
        for work, job in zip(flight.plan.work, flight.jobs, strict=True):
            job.in_flight -= work.tokens
            sampled = found.get(work.seq, NOTHING)
            error = errors.get(work.seq)
            if error is None:
                self._advance(job, work, extra, sampled.tokens)
            else:
                sampled = NOTHING  # a token that came of what others failed to write is no token
            if sampled.filled and self._names(job):
                job.hashes.extend(sampled.filled)
                self._name(job)
            if sampled.tokens:
                job.num_output += sampled.tokens
                job.last_token_at = done.ends[-1]
                if job.first_token_at is None:
                    job.first_token_at = done.ends[0]
            reason = _reason_to_end(job, sampled, error)
            if reason is not None:
                self._parts.finish(now, job, reason, sampled, error)
            elif sampled.tokens or sampled.prompt_logprobs:
                self._roster.tell(job, sampled)

    def _names(self, job: Job) -> bool:
        """Whether blocks that its answer fills get names."""
        is_named = self._has_prefix_cache and not job.request.scores_prompt
        return is_named and not self._parts.briefing.borrows(job.seq)

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
            elif work.seq not in errors and not lost.isdisjoint(self._ledger.tables[work.seq]):
                errors[work.seq] = SHARED_FAILURE
            if work.seq in errors:
                lost |= self._ledger.disown(job, work.start)
        return errors

    def _told(self, now: float, done: Done) -> tuple[tuple[int, int, bool, tuple[str, ...]], ...]:
        """For the event of a completion; what came of guesses is told before it."""
        self._emit_drafted(now, done)
        return tuple(
            [
                (one.seq, one.tokens, one.is_stop, tuple([known.hex() for known in one.filled]))
                for one in done.outputs
            ]
        )

    def _apply_adapted(self, now: float, adapted: Adapted) -> None:
        told = AdapterLoaded(
            at=now,
            who=self._parts.name,
            adapter=adapted.adapter,
            slot=adapted.slot,
            error=adapted.error,
        )
        self._parts.emit(told)
        is_there = adapted.error is None
        for job in self._roster.adapted(adapted.adapter, adapted.slot, is_there):
            self._parts.finish(now, job, "error", NOTHING, adapted.error, "BadRequest")

    def _emit_drafted(self, now: float, done: Done) -> None:
        """What came of guesses: all tokens but the last one were right ones."""
        told = [
            (one.seq, one.drafted, max(0, one.tokens - 1)) for one in done.outputs if one.drafted
        ]
        if told:
            parts = self._parts
            parts.num_drafted += sum([drafted for _, drafted, _ in told])
            parts.num_right += sum([right for _, _, right in told])
            parts.emit(Drafted(at=now, who=parts.name, plan=done.plan, guesses=tuple(told)))

    def _apply_moved(self, now: float, moved: Moved) -> None:
        swap, tiers = self._parts.swap, self._parts.tiers
        if tiers is not None and tiers.has(moved.transfer):
            tiers.moved(now, moved)
            return
        assert swap is not None
        transfer, job, _ = swap.moved(moved.transfer)
        transferred = Transferred(
            at=now,
            who=self._parts.name,
            transfer=transfer.id,
            seq=transfer.seq,
            is_out=transfer.is_out,
            num_blocks=transfer.num_blocks,
            num_runs=len(transfer.runs),
        )
        self._parts.emit(transferred)
        if transfer.is_out or job.status == "ended":
            return
        self._parts.briefing.fetched(job)
        if job.status == "in_transfer":
            self._roster.join(job)
            self._ask_again()
            if job.is_cancelled:
                self._parts.finish(now, job, "cancelled")

    def apply_copied(self, now: float, told: Moved | Filed | Adapted) -> None:
        """Something that was copied beside the steps is there."""
        if isinstance(told, Moved):
            self._apply_moved(now, told)
        elif isinstance(told, Adapted):
            self._apply_adapted(now, told)
        else:
            assert self._parts.tiers is not None, "there is no disk"
            self._parts.tiers.filed(now, told)


def _errors_of(done: Done) -> tuple[tuple[int, str], ...]:
    return tuple([(one.seq, one.error) for one in done.outputs if one.error is not None])


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
