"""A step loop around the policies of one replica, with the model ledger as memory: no time, no asyncio, no engine.

It applies decisions as the replica does: evictions, admissions, chunks in order. After each step the books are
checked: blocks, positions and tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.core.prompt import HashedPrompt
from penstock.core.types import BlockHash, Caps, Job, Request, RequestId, Sampling, Slo
from penstock.policy import batch, find, order
from tests.laws.model_ledger import ModelLedger
from tests.laws.views import Columns, Glass, HalfLengths, LinearCost, World, bind
from tests.laws.views import make_job as drawn_job

CAPS = Caps(num_layers=2, max_context=10_000)


def make_job(
    seq: int,
    prompt: int,
    *,
    max_tokens: int = 100,
    output: int = 0,
    computed: int = 0,
    priority: int = 0,
    arrived_at: float | None = None,
    hashes: Sequence[bytes] = (),
    size: int = 4,
    slo: Slo | None = None,
) -> Job:
    told = tuple(BlockHash(block) for block in hashes)
    request = Request(
        id=RequestId(f"r{seq}"),
        model="m",
        prompt=HashedPrompt(prompt, told, size),
        sampling=Sampling(max_tokens=max_tokens),
        priority=priority,
        slo=slo or Slo(),
    )
    return Job(
        seq=seq,
        request=request,
        answer=0,
        arrived_at=float(seq) if arrived_at is None else arrived_at,
        hashes=list(told),
        num_prompt=prompt,
        max_tokens=max_tokens,
        num_output=output,
        computed=computed,
        first_token_at=0.0 if output else None,
        priority=priority,
        status="running" if computed else "waiting",
    )


@dataclass
class Line:
    """One step as written down: (seq, tokens) of each chunk, and who came and went."""

    chunks: tuple[tuple[int, int], ...]
    admitted: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()
    stable_for: int = 1


@dataclass
class Replica:
    """`lengths`: tokens each job will really produce, by seq (its max_tokens where not told)."""

    batching: Any
    ledger: ModelLedger
    ordering: Any = field(default_factory=lambda: find("order", "fcfs")())
    admit: str = "full-fit"
    evict: str = "recompute-last"
    caps: Caps = CAPS
    lengths: dict[int, int] = field(default_factory=dict)
    running: list[Job] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)
    ended: list[Job] = field(default_factory=list)
    refused: list[Job] = field(default_factory=list)
    now: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    adopted_tokens: int = 0
    _glasses: dict[int, Glass] = field(default_factory=dict)

    def start(self, job: Job) -> None:
        """Put a job among the running as it stands, with the memory of what it computed."""
        assert self.ledger.reserve(job, job.computed)
        self.running.append(job)

    def views_of(self, jobs: Sequence[Job]) -> list[Any]:
        return [self._glasses.setdefault(job.seq, Glass(job)) for job in jobs]

    def view(self) -> tuple[batch.View, list[Job]]:
        running, waiting = self.views_of(self.running), self.views_of(self.waiting)
        ranking_view = order.View(
            self.now,
            self.rng,
            waiting,
            running,
            LinearCost(),
            HalfLengths(),
            lambda: Columns(waiting),
            self.ledger,
        )
        ranked = self.ordering.decide(ranking_view)
        order.law(ranking_view, ranked)
        refused: list[Job] = []
        ask, victims = bind(
            World(self.now, self.ledger, running, waiting), self.rng, self.admit, self.evict
        )

        def asking(job: Any, tokens: int, fork: ModelLedger) -> str:
            answer = ask(job, tokens, fork)
            if answer == "no":
                refused.append(job._job)
            return answer

        view = batch.View(
            now=self.now,
            rng=self.rng,
            running=running,
            waiting=ranked.ranking,
            caps=self.caps,
            ledger=self.ledger,
            cost=LinearCost(),
            lengths=HalfLengths(),
            admit=asking,
            victims=victims,
            columns=lambda: Columns(running),
        )
        return view, refused

    def plan(self) -> Line:
        """What would run next; nothing is applied."""
        view, refused = self.view()
        decision = self.batching.decide(view)
        batch.law(view, decision)
        return line_of(decision, refused)

    def step(self) -> Line:
        view, refused = self.view()
        decision = self.batching.decide(view)
        batch.law(view, decision)
        for eviction in decision.evicted:
            self._preempt(eviction.item._job)  # type: ignore[attr-defined]
        for glass in decision.admitted:
            job = glass._job  # type: ignore[attr-defined]
            self.waiting.remove(job)
            job.status, job.computed = "running", self.ledger.adopt(job)
            self.running.append(job)
        admitted = {job.seq for job in decision.admitted}
        chunks = [chunk for lane in decision.batch.lanes for chunk in lane.chunks]
        for chunk in chunks:
            self._book(chunk.job._job, chunk.tokens, chunk.job.seq in admitted)  # type: ignore[attr-defined]
        for chunk in chunks:
            self._run(chunk.job._job, chunk.tokens)  # type: ignore[attr-defined]
        for job in refused:
            self.waiting.remove(job)
            self.refused.append(job)
        self.now += LinearCost().predict(chunks)
        self.ledger.check(self.running)
        return line_of(decision, refused)

    def _preempt(self, job: Job) -> None:
        self.ledger.release(job)
        job.computed, job.status, job.num_preemptions = 0, "waiting", job.num_preemptions + 1
        self.running.remove(job)
        self.waiting.insert(0, job)

    def _book(self, job: Job, tokens: int, is_new: bool) -> None:
        if is_new and not self.ledger.held(job):
            job.computed = self.ledger.adopt(
                job
            )  # what earlier chunks of this step filled counts too
        if is_new:
            self.adopted_tokens += job.computed
        assert 1 <= tokens <= job.todo
        assert self.ledger.reserve(job, job.computed + tokens), "planned more than fits"

    def _run(self, job: Job, tokens: int) -> None:
        job.computed += tokens
        if job.computed < job.known:
            return
        job.num_output += 1
        job.last_token_at = self.now
        if job.first_token_at is None:
            job.first_token_at = self.now
        if job.num_output == min(self.lengths.get(job.seq, job.max_tokens), job.max_tokens):
            self.ledger.release(job)
            self.running.remove(job)
            self.ended.append(job)

    def run(self, most: int = 10_000) -> list[Line]:
        """Step until nobody is left."""
        lines: list[Line] = []
        while self.running or self.waiting:
            lines.append(self.step())
            line = lines[-1]
            assert line.chunks or line.evicted or line.refused, (
                "nothing runs and nothing was planned"
            )
            assert len(lines) < most, "somebody starves"
        return lines


def line_of(decision: batch.Decision, refused: Sequence[Job]) -> Line:
    return Line(
        tuple((c.job.seq, c.tokens) for lane in decision.batch.lanes for c in lane.chunks),
        tuple(job.seq for job in decision.admitted),
        tuple(eviction.item.seq for eviction in decision.evicted),
        tuple(job.seq for job in refused),
        decision.stable_for,
    )


def crowd(rng: random.Random, num: int) -> list[Job]:
    """Jobs that have just come, with shared prefixes."""
    jobs = [drawn_job(rng, seq, 5.0) for seq in range(num)]
    for job in jobs:
        job.num_output, job.first_token_at, job.last_token_at = 0, None, None
    return jobs
