"""What runs in the next step? Asked by the replica for each step, on a fork of its ledger.

The policy books what it plans on `view.ledger.fork()`, may ask `view.admit(job, tokens, fork)` whether a waiting job
may start and `view.victims(job, blocks, among, fork)` who makes room. The replica then applies the decision in this
order: evictions, admissions, launch.

A policy with `interrupts = True` is also asked when all lanes are busy and something arrived or ended: it may ask a
running plan to stop inside its forward (`Decision.interrupt`), at the finest boundary the executor has. The plan is
then among `view.suspended`, its jobs keep their blocks, and its lane is idle until the policy resumes it
(`Decision.resume`) or its last job is cancelled, which aborts it. Who suspends plans has to resume them: nobody else
does.

Images of a prompt are encoded before it is computed. A policy with `encodes = True` says which (`Decision.encodes`), so
that they take the part of a step it gives them, and starts prompts whose images are encoded; for any other policy the
images of a prompt are encoded in the step that computes its first tokens.

A policy's `num_lanes` says how many plans it is made to have side by side; it gets as many where the executor can run
them and nobody says otherwise, and has to do with one where not.

Law: every job appears in at most one chunk, and in none while a plan with it still runs (unless caps.async_depth >
1); 1 <= tokens <= todo (for a waiting job: known - cached), or all tokens of the phase that the job's frontier
offers, or in the phase "verify" the one position that is left to a job that has written, and room for guesses behind
it, together not more than it may still write; the sum stays within caps.max_batch_tokens; chunks are of running or
admitted jobs that are not evicted; admitted jobs were waiting and are at most caps.max_jobs with the running; shares
are in (0, 1] and sum to at most caps.max_total_share; layer ranges are only asked of executors that have them, never
to verify, and a chunk that has passed some layers goes on with the same tokens where it stopped; everything fits in
memory after the evictions; only plans that run are interrupted, only suspended ones resumed, each on its own lane,
which nothing else is planned for; images are encoded of jobs that have so many left, in a step that is decided once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.core.images import images_left
from penstock.core.records import Record
from penstock.core.types import Caps
from penstock.core.views import (
    NO_PROGRAMS,
    Admit,
    Batch,
    Chunk,
    Columns,
    Cost,
    Eviction,
    Flying,
    JobView,
    Ledger,
    Lengths,
    Programs,
    Rng,
    Victims,
)

STABLE = (
    1 << 30
)  # steps: longer than any run of steps; the replica bounds it by completions and blocks


@dataclass(slots=True)
class View:
    """`running`: in the order of admission. `waiting`: as ranked by the order policy. `busy_lanes`: not to be used."""

    now: float
    rng: Rng
    running: Sequence[JobView]
    waiting: Sequence[JobView]
    caps: Caps
    ledger: Ledger
    cost: Cost
    lengths: Lengths
    admit: Admit
    victims: Victims
    columns: Callable[[], Columns]  # over `running`
    busy_lanes: Sequence[int] = ()
    programs: Programs = NO_PROGRAMS
    flying: Sequence[Flying] = ()
    suspended: Sequence[Flying] = ()


class Decision(Record):
    """`stable_for`: steps for which the same chunks would be planned if nothing arrived, ended or ran short, and admit
    answered the same (for how long it does is asked of its answers).

    `outlasts`: from the next step on the answer is one token of every running job, without those who have ended, as
    long as nobody waits, each of them has written something and has one position to compute, and blocks suffice; the
    policy need not be asked again before that.
    """

    batch: Batch = Batch()
    admitted: tuple[JobView, ...] = ()
    evicted: tuple[Eviction[JobView], ...] = ()
    why: str = ""
    stable_for: int = 1
    outlasts: bool = False
    interrupt: tuple[int, ...] = ()  # plans
    resume: tuple[int, ...] = ()
    encodes: tuple[tuple[JobView, int], ...] = ()  # waiting jobs, and how many of their images


def law(view: View, decision: Decision) -> None:
    assert decision.stable_for >= 1, "stable_for counts this step, so it is at least 1"
    if decision.outlasts:
        is_plain = len(decision.batch.lanes) < 2 and decision.batch.nano is None
        is_plain = is_plain and not (decision.interrupt or decision.resume)
        assert is_plain, "what follows a plan of several lanes, or one that stopped, is asked for"
    running = {job.seq for job in view.running}
    waiting = {job.seq for job in view.waiting}
    admitted = [job.seq for job in decision.admitted]
    evicted = [eviction.item.seq for eviction in decision.evicted]
    assert set(admitted) <= waiting and len(set(admitted)) == len(admitted), (
        "admitted a stranger, or twice"
    )
    assert set(evicted) <= running and len(set(evicted)) == len(evicted), (
        "evicted a stranger, or twice"
    )
    assert not any(eviction.item.in_flight for eviction in decision.evicted), (
        "evicted a job of a plan that has not ended"
    )
    alive = (running - set(evicted)) | set(admitted)
    assert len(alive) <= max(view.caps.max_jobs, len(running)), "more jobs than the executor takes"
    _law_of_chunks(view, decision, alive)
    _law_of_plans(view, decision)
    _law_of_images(view, decision)
    _law_of_memory(view, decision)


def _law_of_chunks(view: View, decision: Decision, alive: set[int]) -> None:
    lanes = decision.batch.lanes
    assert len(lanes) <= view.caps.max_lanes, "more lanes than the executor has"
    assert all(0 < lane.share <= 1 for lane in lanes), "a share is outside (0, 1]"
    assert sum(lane.share for lane in lanes) <= view.caps.max_total_share + 1e-9, (
        "shares sum to too much"
    )
    chunks = [chunk for lane in lanes for chunk in lane.chunks]
    seqs = [chunk.job.seq for chunk in chunks]
    assert len(set(seqs)) == len(seqs), "a job stands in two chunks"
    assert set(seqs) <= alive, "a chunk of a job that is not running"
    assert sum(chunk.tokens for chunk in chunks) <= view.caps.max_batch_tokens, (
        "token budget exceeded"
    )
    waiting = {job.seq for job in view.waiting}
    fork = view.ledger.fork()
    for chunk in chunks:
        job = chunk.job
        todo = _todo(job, chunk, fork.cached(job) if job.seq in waiting else None)
        is_free = not job.in_flight or view.caps.async_depth > 1
        assert is_free, f"job {job.seq} is part of a plan that still runs"
        assert 1 <= chunk.tokens <= todo, f"job {job.seq}: {chunk.tokens} tokens of {todo}"
        _law_of_layers(view.caps, chunk)


def _todo(job: JobView, chunk: Chunk, cached: int | None) -> int:
    """The most tokens the chunk may have. `cached` None: the job runs."""
    if chunk.phase == "verify":
        is_decode = cached is None and job.num_output > 0 and job.todo == 1
        assert is_decode, f"job {job.seq} has more to compute than its last token"
        assert chunk.layers is None, "guesses are verified by whole models"
        return job.max_tokens - job.num_output
    options = [option for option in job.frontier() if option.phase == chunk.phase]
    assert options or job.in_flight, f"job {job.seq} has no phase {chunk.phase} now"
    if chunk.phase == "extend":
        return job.todo if cached is None else job.known - cached
    assert chunk.tokens == options[0].tokens_min, f"job {job.seq}: a phase is run whole"
    return options[0].tokens_max


def _law_of_layers(caps: Caps, chunk: Chunk) -> None:
    tokens, passed = chunk.job.carried or (chunk.tokens, 0)
    first, end = chunk.layers or (0, caps.num_layers)
    assert chunk.layers is None or caps.has_layer_ranges, "this executor runs whole models only"
    assert 0 <= first < end <= caps.num_layers, f"no such layers {chunk.layers}"
    assert first == passed and chunk.tokens == tokens, (
        f"job {chunk.job.seq}: {tokens} tokens have passed {passed} layers and go on from there"
    )


def _law_of_plans(view: View, decision: Decision) -> None:
    flying = {each.plan for each in view.flying}
    suspended = {each.plan: each.lane for each in view.suspended}
    assert set(decision.interrupt) <= flying, "a plan that does not run cannot be interrupted"
    assert set(decision.resume) <= set(suspended), "a plan that is not suspended cannot be resumed"
    lanes = [suspended[plan] for plan in decision.resume]
    assert len(set(lanes)) == len(lanes), "two plans on one lane"
    assert not set(lanes) & set(view.busy_lanes), "the lane is busy"
    num_free = view.caps.max_lanes - len(view.busy_lanes) - len(lanes)
    assert len(decision.batch.lanes) <= num_free or not (lanes or decision.interrupt), (
        "no idle lane for that"
    )


def _law_of_images(view: View, decision: Decision) -> None:
    asked = [(job.seq, number, len(images_left(job))) for job, number in decision.encodes]
    assert len({seq for seq, _, _ in asked}) == len(asked), "images of a job are named twice"
    assert {seq for seq, _, _ in asked} <= {job.seq for job in view.waiting}, (
        "images of a job that does not wait"
    )
    for seq, number, left in asked:
        assert 1 <= number <= left, f"job {seq}: {number} images of {left}"
    assert not asked or decision.stable_for == 1, "images are encoded once"


def _law_of_memory(view: View, decision: Decision) -> None:
    fork = view.ledger.fork()
    for eviction in decision.evicted:
        fork.release(eviction.item)
    waiting = {job.seq for job in view.waiting}
    for lane in decision.batch.lanes:
        for job, tokens, _, phase in lane.chunks:
            start = fork.cached(job) if job.seq in waiting else job.computed + job.in_flight
            is_row = phase in ("extend", "verify")
            upto = start + tokens if is_row else job.frontier()[0].holds
            assert upto is not None, f"phase {phase} says what it holds"
            assert fork.reserve(job, upto), f"job {job.seq} does not fit in memory"


class Policy(Protocol):
    def decide(self, view: View) -> Decision: ...
