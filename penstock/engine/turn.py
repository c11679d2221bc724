"""One step of decisions: asks the policies, traces what they said, and hands back one plan of chunks.

The batch policy plans on forks of the ledger and may ask `admit` and `evict` through its view; this file binds them.
Every inner answer is part of the decision's digest, and with `is_checked` every answer is held to its kind's law.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import get_args

from penstock.core.records import Record
from penstock.core.rng import stream
from penstock.core.types import Caps, Phase
from penstock.core.views import (
    NO_PROGRAMS,
    Answer,
    Batch,
    Chunk,
    Columns,
    Cost,
    Eviction,
    Flying,
    JobView,
    Lane,
    LedgerFork,
    Lengths,
    Programs,
    Singles,
)
from penstock.engine.joblist import JobList
from penstock.engine.ledger import BlockLedger
from penstock.policy import admit, batch, evict, fetch, order
from penstock.policy.fetch.cheaper import Cheaper

PHASES = get_args(Phase)
FOREVER = 1 << 30  # steps for which nothing is ranked as before
Chunks = tuple[tuple[int, int], ...]  # (seq, tokens) of one lane, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPolicies:
    """The decisions inside a replica. `evict`: running jobs, `blocks`: idle cached blocks, `fetch`: back from tiers."""

    order: order.Policy
    admit: admit.Policy
    batch: batch.Policy
    blocks: evict.Policy
    evict: evict.Policy
    fetch: fetch.Policy = field(default_factory=Cheaper)

    def all(self) -> tuple[object, ...]:
        return self.order, self.admit, self.batch, self.evict, self.blocks, self.fetch


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictors:
    """What policies may consult about the outside: step times, answer lengths, agent runs."""

    cost: Cost
    lengths: Lengths
    programs: Programs = NO_PROGRAMS


class Verdict(Record):
    """What the policies decided for one step, and for how many more it would stay the same. `chunks`: by lane.

    `offloaded` and `loaded`: whose blocks the replica moves for it.
    """

    decision: batch.Decision
    chunks: list[Chunks]
    refused: list[tuple[JobView, str]]
    digest: str
    stable_for: int
    why: str
    offloaded: tuple[int, ...] = ()
    loaded: tuple[int, ...] = ()


class Council:
    """The policies of one replica, with their streams of chance and the predictors they may consult."""

    def __init__(
        self,
        policies: ReplicaPolicies,
        ledger: BlockLedger,
        predictors: Predictors,
        *,
        seed: int,
        name: str,
        is_checked: bool = False,
    ) -> None:
        self.policies = policies
        self._ledger = ledger
        self._cost, self._lengths = predictors.cost, predictors.lengths
        self._is_checked = is_checked
        kinds = ("order", "admit", "batch", "evict", "blocks")
        self._rng = {kind: stream(seed, name, kind) for kind in kinds}
        self._now = 0.0
        self._running: Sequence[JobView] = ()
        self._trace = array("q")
        self._refused: list[tuple[JobView, str]] = []
        self._whys: list[str] = []
        self._outlasts = (
            False  # what is planned after the last decision is known; see batch.Decision
        )
        self._is_mixed = True  # somebody may have more than one position to compute
        self._stands = FOREVER  # steps for which the answers of admit do
        rank = getattr(policies.blocks, "rank", None)
        is_known = getattr(policies.blocks, "takes_oldest", False) or (
            rank is not None and ledger.keeps_order(rank)
        )
        if is_checked or not is_known:
            ledger.choose_idle = self._choose_idle
        # Views are valid during the call only, so one of each is enough; what changes is set for each step.
        self._ranking: Sequence[JobView] = ()
        self._order_view = order.View(
            now=0.0,
            rng=self._rng["order"],
            waiting=(),
            running=(),
            cost=self._cost,
            lengths=self._lengths,
            columns=_no_columns,
            programs=predictors.programs,
            ledger=ledger,
        )
        self._batch_view = batch.View(
            now=0.0,
            rng=self._rng["batch"],
            running=(),
            waiting=(),
            caps=Caps(num_layers=1, max_context=1),
            ledger=ledger,
            cost=self._cost,
            lengths=self._lengths,
            admit=self._admit,
            victims=self._victims,
            columns=_no_columns,
            programs=predictors.programs,
        )

    def decide(
        self,
        now: float,
        *,
        running: JobList,
        waiting: JobList,
        caps: Caps,
        flying: Sequence[Flying] = (),
        suspended: Sequence[Flying] = (),
    ) -> Verdict:
        """One transaction: rank the waiting, plan a batch. Nothing real is touched."""
        goes_on = not (flying or suspended) and self._can_go_on(running, waiting)
        self._now, self._running = now, running.jobs
        self._trace, self._refused, self._whys = array("q"), [], []
        self._stands = FOREVER
        ranking, stable = self._rank(running, waiting) if waiting.jobs else ((), FOREVER)
        view = self._batch_view
        view.now, view.running, view.waiting = now, running.jobs, ranking
        view.caps, view.columns = caps, running.columns
        view.flying, view.suspended = flying, suspended
        view.busy_lanes = [each.lane for each in flying] if flying else ()
        decision = self.policies.batch.decide(view)
        if self._is_checked:
            batch.law(view, decision)
        whys = self._whys
        if decision.why:
            whys.append(decision.why)
        chunks, digest = self._digest(decision)
        if goes_on:
            plain = _decodes_of(running.jobs)
            told: object = batch.Decision(plain, stable_for=batch.STABLE, outlasts=True)
            assert decision == told, "the last decision did not outlast"
        self._outlasts, self._is_mixed = decision.outlasts, True
        why = whys[0] if len(whys) == 1 else "; ".join(whys)
        stable = min(stable, self._stands, decision.stable_for)
        return Verdict(decision, chunks, self._refused, digest, stable, why)

    def ask_again(self) -> None:
        """A job has joined the running: the last decision is none for it."""
        self._outlasts = False

    def goes_on(self, running: JobList, waiting: JobList) -> bool:
        """Whether one token of every running job is decided, and nobody need be asked. Not while a plan runs."""
        return self._outlasts and not self._is_checked and self._can_go_on(running, waiting)

    def _can_go_on(self, running: JobList, waiting: JobList) -> bool:
        """Whether a decision that outlasts is still the one: nobody waits, all decode, and blocks suffice."""
        jobs = running.jobs
        if waiting.jobs or not (self._outlasts and 0 < len(jobs) <= self._ledger.free):
            return False
        if self._is_mixed:
            for job in jobs:
                if not job.num_output or job.num_prompt + job.num_output != job.computed + 1:
                    return False
            self._is_mixed = False
        return True

    def _rank(self, running: JobList, waiting: JobList) -> tuple[Sequence[JobView], int]:
        view = self._order_view
        view.now, view.waiting, view.running = self._now, waiting.jobs, running.jobs
        view.columns = waiting.columns
        decision = self.policies.order.decide(view)
        if self._is_checked:
            order.law(view, decision)
        if decision.ranking is not waiting.jobs:
            self._trace.extend(job.seq for job in decision.ranking)
        if decision.why:
            self._whys.append(decision.why)
        self._ranking = decision.ranking
        return decision.ranking, decision.stable_for

    def head(self) -> JobView | None:
        """Who waits and was ranked before all others that still do."""
        return next((job for job in self._ranking if job.status == "waiting"), None)

    def _admit(self, job: JobView, tokens: int, fork: LedgerFork) -> Answer:
        view = admit.View(
            self._now, self._rng["admit"], job, tokens, fork, self._running, self._lengths
        )
        decision = self.policies.admit.decide(view)
        if self._is_checked:
            admit.law(view, decision)
        self._trace.extend((-1, job.seq, ("yes", "later", "no").index(decision.answer)))
        stands = decision.stable_for if decision.answer == "later" else 1
        if stands < self._stands:
            self._stands = stands
        if decision.answer == "no":
            self._refused.append((job, decision.why))
        elif decision.why:
            self._whys.append(decision.why)
        return decision.answer

    def _victims(
        self, job: JobView, need: int, among: Sequence[JobView], fork: LedgerFork
    ) -> Sequence[Eviction[JobView]]:
        freed: Callable[[object], int] = fork.freeable  # type: ignore[assignment]
        view = evict.View(
            now=self._now,
            rng=self._rng["evict"],
            need=need,
            asker=job,
            items=among,
            freed=freed,
            ledger=fork,
        )
        decision = self.policies.evict.decide(view)
        if self._is_checked:
            evict.law(view, decision)
        chosen: list[Eviction[JobView]] = list(decision.evictions)  # type: ignore[arg-type]
        self._trace.extend((-2, job.seq, *(eviction.item.seq for eviction in chosen)))
        if decision.why:
            self._whys.append(decision.why)
        return chosen

    def _choose_idle(self, need: int) -> Sequence[int]:
        view = evict.View(
            now=self._now,
            rng=self._rng["blocks"],
            need=need,
            asker=None,
            items=self._ledger.idle_items(),
            freed=lambda item: item.num_blocks,  # type: ignore[union-attr]
        )
        if self._is_checked:
            view.items = list(view.items)  # the law looks at them once more
        decision = self.policies.blocks.decide(view)
        if self._is_checked:
            evict.law(view, decision)
        return [eviction.item.id for eviction in decision.evictions]  # type: ignore[union-attr]

    def _digest(self, decision: batch.Decision) -> tuple[list[Chunks], str]:
        """The chunks of each lane, and a hash over all that was said: ranking, admissions, victims, lanes.

        "" when the event that holds it says it all: no inner answer was given, and a plain decode step has the whole
        device. Not over the idle blocks that lose their contents: which ones do, shows in what later steps find cached;
        and their numbers are not the same when steps run as one.
        """
        trace, lanes = self._trace, decision.batch.lanes
        if decision.encodes:
            trace.append(-9)
            trace.extend(
                chain.from_iterable([(job.seq, number) for job, number in decision.encodes])
            )
        if not trace and len(lanes) == 1:
            chunks = lanes[0].chunks
            if isinstance(chunks, Singles) and not chunks.others and lanes[0].share == 1.0:
                if not (decision.admitted or decision.evicted or decision.batch.nano):
                    return [_told(chunks)], ""
        if decision.admitted or decision.evicted:
            trace.append(-5)
            trace.extend([job.seq for job in decision.admitted])
            trace.extend([-6 - job.seq for job, _ in decision.evicted])
        found: list[Chunks] = []
        for chunks, share in lanes:
            told = _told(chunks)
            found.append(told)
            said = [-3, round(share * (1 << 30))]
            some = chunks.others if isinstance(chunks, Singles) else chunks
            if any([layers is not None or phase != "extend" for _, _, layers, phase in some]):
                said += _spelled(chunks)
            else:
                said += chain.from_iterable(told)
            trace.fromlist(said)
        if decision.interrupt or decision.resume:
            trace.extend((-7, *decision.interrupt, -8, *decision.resume))
        hashed = hashlib.blake2b(trace, digest_size=8)
        if decision.batch.nano is not None:
            hashed.update(decision.batch.nano.encode())
        return found, hashed.hexdigest()


def _told(chunks: tuple[Chunk, ...] | Singles) -> Chunks:
    if not isinstance(chunks, Singles):
        return tuple([(job.seq, tokens) for job, tokens, _, _ in chunks])
    told = [(job.seq, 1) for job in chunks.jobs]
    told += [(job.seq, tokens) for job, tokens, _, _ in chunks.others]
    return tuple(told)


def _decodes_of(running: Sequence[JobView]) -> Batch:
    return Batch((Lane(Singles(tuple(running))),))


def _no_columns() -> Columns:
    raise AssertionError("a view was used outside its call")


def _spelled(chunks: Iterable[Chunk]) -> Iterator[int]:
    """Chunks as numbers, with the layers and phases of those that have any."""
    for job, tokens, layers, phase in chunks:
        yield from (job.seq, tokens)
        if layers is not None or phase != "extend":
            yield from (-4, PHASES.index(phase), *(layers or ()))
