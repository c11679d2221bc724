"""A dense batch of constant size: every decode, and prefill tokens up to the same total in every step.

Source: NanoFlow (Zhu et al., OSDI 2025; efeslab/Nanoflow @d6b381e), its batch former.

Idea: a pipeline of nano-batches is made for one number of tokens (lab.nano_search), so the batch former keeps to it.
The decodes of all running jobs come first; prompts, those begun before those that wait, are cut so that the rest of
the batch is full. The next batch is formed while one runs, so that an answer is known to have ended one step late: its
slot has then been computed once more for nothing.

    budget of a step = max_tokens - late         late: answers that ended by themselves (EOS) in the step before
    slots for jobs   = max_jobs - late           an end at max_tokens is foreseen and costs neither

Parameters
    max_tokens      tokens of the dense batch, default 2048; never above the executor's own limit
    max_jobs        jobs running at once, default 1024; never above the executor's own limit
    nano            the one pipeline template that may be used, default None: whichever the executor has
    nano_from       tokens from which a batch counts as full enough for a template, default None: half of its size; the
                    template computes its own size in any case
    is_late         charge late ends as above, default True

The smallest of the executor's templates that holds a batch is taken (Caps.templates); where it has none, as engines on
a CPU, all batches are plain forwards, and the rest stands.

Where we differ: victims, admission and ranking are answers of other policies; NanoFlow admits by the memory that it
expects from mean output lengths, and offloads KV to the host. Its admissions lag a step as its ends do; ours do not.
Its pipeline runs every batch; here the plain forward takes over where a template would compute mostly padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.events import Event, Finished
from penstock.core.types import Caps
from penstock.core.views import Batch, Chunk, Eviction, JobView, Lane, LedgerFork, Singles
from penstock.policy.batch import STABLE, Decision, View
from penstock.policy.batch.decodes import all_decodes


@dataclass(slots=True)
class Forming:
    """A batch in the making. `gone` names the jobs preempted in this call."""

    fork: LedgerFork
    budget: int
    chunks: dict[int, Chunk] = field(default_factory=dict)
    admitted: list[JobView] = field(default_factory=list)
    evicted: list[Eviction[JobView]] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)
    is_blocked: bool = False  # the head of the line waits for memory
    is_held: bool = False  # it waits, for whatever reason the admit policy has

    def add(self, job: JobView, tokens: int) -> None:
        self.chunks[job.seq] = Chunk(job, tokens)
        self.budget -= tokens


@dataclass(slots=True)
class ConstantDense:
    max_tokens: int = 2048
    max_jobs: int = 1024
    nano: str | None = None
    nano_from: int | None = None
    is_late: bool = True
    _late: int = field(init=False, default=0, repr=False)  # answers that ended at _ended_at
    _ended_at: float | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_jobs", "nano_from"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def observe(self, event: Event) -> None:
        """Count the answers that ended with the latest step; earlier ones have cost their token already."""
        if isinstance(event, Finished) and event.reason == "stop" and self.is_late:
            self._late = self._late + 1 if event.at == self._ended_at else 1
            self._ended_at = event.at

    def decide(self, view: View) -> Decision:
        if view.busy_lanes:
            return Decision(why="the lane is busy")
        late = self._late if self._ended_at == view.now else 0
        running, caps, fork = view.running, view.caps, view.ledger.fork()
        # An answer that ended late leaves at least one token for the others: a step must go on.
        budget = max(1, min(self.max_tokens, caps.max_batch_tokens) - late)
        slots = min(self.max_jobs - late, caps.max_jobs) - len(running)
        decodes = all_decodes(running, fork) if len(running) <= budget else None
        if decodes and not view.waiting:
            batch = self._batch(caps, decodes, len(decodes))
            return Decision(batch, stable_for=STABLE, outlasts=not caps.templates)
        if decodes is not None:
            forming = Forming(fork, budget - len(decodes))
        else:
            forming = Forming(view.ledger.fork(), budget)
            self._continue(view, forming)
        if view.waiting and not forming.gone:
            self._start(view, forming, slots)
        chunks: tuple[Chunk, ...] | Singles = decodes or ()
        if forming.chunks:
            chunks = (*chunks, *forming.chunks.values())
        is_stable = bool(decodes) and not forming.admitted and forming.is_held and not late
        return Decision(
            self._batch(caps, chunks, budget - forming.budget),
            tuple(forming.admitted),
            tuple(forming.evicted),
            _told(late) or ("waits for memory" if forming.is_blocked else ""),
            STABLE if is_stable else 1,
        )

    def _batch(self, caps: Caps, chunks: tuple[Chunk, ...] | Singles, tokens: int) -> Batch:
        if not chunks:
            return Batch()
        return Batch((Lane(chunks),), self._template(caps, tokens) if caps.templates else None)

    def _template(self, caps: Caps, tokens: int) -> str | None:
        """The smallest that holds so many tokens, if they fill it well enough."""
        for template in caps.templates:
            if self.nano in (None, template.name) and tokens <= template.tokens:
                least = (template.tokens + 1) // 2 if self.nano_from is None else self.nano_from
                return template.name if tokens >= least else None
        return None

    def _continue(self, view: View, forming: Forming) -> None:
        """Decodes first, then prompts that were begun, each in the order of admission."""
        size = forming.fork.block_size
        prompts = []
        for job in view.running:
            if job.todo > 1:
                prompts.append(job)
            elif job.todo == 1 and forming.budget > 0 and job.seq not in forming.gone:
                start = job.computed + job.in_flight
                # Only positions that begin a block take one, and those that fill one may be shared afterwards.
                if 0 < start % size < size - 1 or reserved(view, forming, job, start + 1):
                    forming.add(job, 1)
        for job in prompts:
            if forming.budget > 0 and job.seq not in forming.gone:
                tokens = min(job.todo, forming.budget)
                if reserved(view, forming, job, job.computed + job.in_flight + tokens):
                    forming.add(job, tokens)

    def _start(self, view: View, forming: Forming, slots: int) -> None:
        """Fill the batch with prompts of waiting jobs; nobody overtakes the head."""
        fork, is_refused = forming.fork, False
        for job in view.waiting:
            if forming.budget < 1 or len(forming.admitted) >= slots:
                return
            cached = fork.cached(job)
            tokens = min(job.known - cached, forming.budget)
            answer = view.admit(job, tokens, fork)
            if answer == "no":
                is_refused = True
                continue
            if answer == "later":
                forming.is_held = not is_refused
                forming.is_blocked = forming.is_held and fork.need(job, job.known) > fork.free
                return
            if not fork.reserve(job, cached + tokens):
                return
            forming.admitted.append(job)
            forming.add(job, tokens)


def reserved(view: View, forming: Forming, job: JobView, upto: int) -> bool:
    """Preempt until `job` holds [0, upto). False when it gave up itself or nobody could leave."""
    fork = forming.fork
    while not fork.reserve(job, upto):
        among = [other for other in view.running if other.seq not in forming.gone]
        victims = view.victims(job, fork.need(job, upto) - fork.free, among, fork)
        if not victims:
            return False
        for eviction in victims:
            seq = eviction.item.seq
            fork.release(eviction.item)
            forming.gone.add(seq)
            forming.evicted.append(eviction)
            planned = forming.chunks.pop(seq, None)
            if planned is not None:
                forming.budget += planned.tokens
            if seq == job.seq:
                return False
            if fork.need(job, upto) <= fork.free:
                break
    return True


def _told(late: int) -> str:
    return f"{late} ended late" if late else ""
