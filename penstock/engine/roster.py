"""The jobs inside one replica: who waits, who runs, what their callers are still owed.

Keeps the lists, the blocks and the tellings in step: a job that starts adopts its cached prefix, one that is preempted
gives its blocks back and goes to the head of the queue, one that ends is told about and forgotten. No decision is
taken here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from msgspec import UNSET, UnsetType

from penstock.core.arrivals import arrival_of
from penstock.core.canvas import CanvasJob
from penstock.core.events import Event, Finished
from penstock.core.moving import JobState
from penstock.core.plans import Sampled
from penstock.core.prompt import private_hashes
from penstock.core.types import BlockHash, CanvasRule, FinishReason, Job, Output, Request, Status
from penstock.engine.encodings import Encodings
from penstock.engine.joblist import JobList
from penstock.engine.ledger import BlockLedger
from penstock.engine.residents import Residents

NOTHING = Sampled(0, 0)


class Roster:
    """`emit` hears the events Arrived and Finished; `outputs` collects what callers are to be told."""

    def __init__(
        self,
        name: str,
        ledger: BlockLedger,
        emit: Callable[[Event], None],
        *,
        max_context: int,
        canvas: CanvasRule | None = None,
        residents: Residents | None = None,
    ) -> None:
        self._name = name
        self._ledger = ledger
        self._emit = emit
        self.room_of: Callable[[str], int] = lambda request: max_context
        self._canvas = canvas
        self.residents = residents
        self.waiting = JobList(is_live=False)
        self.running = JobList(is_live=True)
        self.fetched: dict[int, Job] = {}  # admitted, and their blocks are on the way to the device
        self.held: dict[int, Job] = {}  # on their way to another replica, or from one
        self.stand_ins: set[int] = set()  # see engine.stand_ins
        self.images = Encodings()
        self.outputs: list[tuple[str, Output]] = []
        self._by_request: dict[str, list[Job]] = {}
        self._next_seq = 0
        self.num_preemptions = 0

    @property
    def is_empty(self) -> bool:
        return not self._by_request

    @property
    def num_blocked(self) -> int:
        """Jobs whose adapters are not there yet, whom no policy sees."""
        return 0 if self.residents is None else self.residents.num_blocked

    @property
    def is_all_blocked(self) -> bool:
        """Nobody can run: they wait for adapters, or are on their way from or to another replica."""
        if self.running.jobs or self.waiting.jobs or self.fetched:
            return False
        return self.num_blocked > 0 or bool(self.held)

    def request_ids(self) -> tuple[str, ...]:
        return tuple(self._by_request)

    def has(self, request_id: str) -> bool:
        return request_id in self._by_request

    def jobs_of(self, request_id: str) -> list[Job]:
        return list(self._by_request.get(request_id, ()))

    def arrive(
        self, now: float, request: Request, every_token: bool, state: JobState | None = None
    ) -> list[Job]:
        """Make the request's n jobs; they share the hashes of its prompt, and so its blocks.

        With a `state` its one answer goes on from there.
        """
        jobs = self._jobs_for(now, request, every_token, state)
        for job in jobs:
            self._line_up(job)
        self._settle(request)
        return jobs

    def _jobs_for(
        self,
        now: float,
        request: Request,
        every_token: bool,
        state: JobState | None = None,
        move: int | UnsetType = UNSET,
    ) -> list[Job]:
        assert request.id not in self._by_request, f"{request.id} is here already"
        hashes = self._hashes(request) if self._canvas is None else ()
        who, seq = self._name, self._next_seq
        self._emit(
            arrival_of(request, at=now, who=who, seq=seq, hashes=hashes, state=state, move=move)
        )
        jobs = []
        for answer in range(request.n):
            job = self._make(now, request, answer, list(hashes), every_token)
            self._next_seq += 1
            jobs.append(job)
            if state is not None:
                self.bring(now, job, state)
        self._by_request[request.id] = jobs
        return jobs

    def expect(self, now: float, request: Request, state: JobState, move: int) -> Job:
        """Make the job of a request that comes from another replica, in no list yet."""
        (job,) = self._jobs_for(now, request, state.is_streamed, state, move)
        job.status = "in_transfer"
        self.held[job.seq] = job
        return job

    def bring(self, now: float, job: Job, state: JobState) -> None:
        """What a job that comes from another replica has become there."""
        job.num_output, job.cached = state.num_output, state.cached
        job.num_preemptions, job.num_recomputed = state.num_preemptions, state.num_recomputed
        job.arrived_at = now - state.age_s
        for name in ("admitted", "first_token", "last_token"):
            age_s = getattr(state, f"{name}_age_s")
            setattr(job, f"{name}_at", None if age_s is None else now - age_s)
        if state.filled and self._ledger.has_prefix_cache:
            del job.hashes[job.num_prompt // self._ledger.block_size :]
            job.hashes += state.filled

    def hold(self, job: Job) -> None:
        """Out of its list, with all its blocks: it leaves for another replica."""
        (self.running if job.status == "running" else self.waiting).remove(job)
        job.status = "in_transfer"
        self.held[job.seq] = job

    def take_back(self, job: Job, status: Status) -> None:
        """It goes on here after all, where it stood."""
        del self.held[job.seq]
        job.status = status
        if status == "running":
            self.running.append(job)
        else:
            self.waiting.push_front(job)

    def admit(self, job: Job) -> None:
        """From those who come to the running: its blocks are there."""
        del self.held[job.seq]
        job.status = "running"
        if job.admitted_at is None:
            job.admitted_at = job.arrived_at
        self.running.append(job)

    def line_up(self, job: Job) -> None:
        """From those who come to the waiting: it brought no blocks."""
        del self.held[job.seq]
        job.status = "waiting"
        self.waiting.append(job)

    def let_go(self, job: Job) -> None:
        """Forget a job that goes on elsewhere, or never came to be here."""
        del self.held[job.seq]
        self._ledger.release(job, job.computed)
        job.status = "ended"
        del self._by_request[job.request.id]

    def _line_up(self, job: Job) -> None:
        """Among the waiting, unless its adapter has to come first."""
        if self.residents is None or job.request.adapter is None or self.residents.take(job):
            self.waiting.append(job)
        else:
            job.status = "blocked"

    def _settle(self, request: Request) -> None:
        """Jobs of an adapter came or went: others may come in."""
        if self.residents is None or request.adapter is None:
            return
        for job in self.residents.settle():
            self._unblock(job)

    def _unblock(self, job: Job) -> None:
        job.status = "waiting"
        self.waiting.append(job)

    def adapted(self, adapter: str, slot: int, is_there: bool) -> list[Job]:
        """An adapter was loaded, or could not be; then the jobs that cannot be served, which are to be finished."""
        assert self.residents is not None
        jobs = self.residents.loaded(adapter, slot, is_there)
        ready = jobs if is_there else []
        for job in (*ready, *self.residents.settle()):
            self._unblock(job)
        return [] if is_there else jobs

    def _make(
        self, now: float, request: Request, answer: int, hashes: list[BlockHash], every_token: bool
    ) -> Job:
        num_prompt = request.prompt.num_tokens
        max_tokens = min(request.sampling.max_tokens, self.room_of(request.id) - num_prompt)
        if self._canvas is None and not request.parts:  # told by name, which costs least
            return Job(
                seq=self._next_seq,
                request=request,
                answer=answer,
                arrived_at=now,
                hashes=hashes,
                num_prompt=num_prompt,
                max_tokens=max_tokens,
                priority=request.priority,
                is_streamed=every_token,
            )
        facts: dict[str, Any] = {
            "seq": self._next_seq,
            "request": request,
            "answer": answer,
            "arrived_at": now,
            "hashes": hashes,
            "num_prompt": num_prompt,
            "max_tokens": max_tokens,
            "priority": request.priority,
            "is_streamed": every_token,
        }
        if request.parts:
            return self.images.make(request, facts)
        return CanvasJob(**facts, rule=cast(CanvasRule, self._canvas))

    def _hashes(self, request: Request) -> tuple[BlockHash, ...]:
        """None for prompts that are read off: a block that is found again is one whose tokens nobody computes."""
        if request.scores_prompt:
            return ()
        size = self._ledger.block_size
        hashes = request.prompt.blocks(size) if self._ledger.has_prefix_cache else ()
        if not hashes and request.n > 1:
            return private_hashes(request.id, request.prompt.num_tokens // size)
        return tuple(hashes)

    def start(self, now: float, job: Job) -> None:
        """From waiting to running, with the cached prefix pinned."""
        self.waiting.remove(job)
        job.computed = self._ledger.adopt(job)
        job.num_recomputed += max(0, job.furthest - job.computed)
        job.status = "running"
        if job.admitted_at is None:
            job.admitted_at = now
        self.running.append(job)

    def wait_for_blocks(self, job: Job) -> None:
        """From running to those who wait for a copy of their blocks, whom no policy sees."""
        self.running.remove(job)
        job.status = "in_transfer"
        self.fetched[job.seq] = job

    def join(self, job: Job) -> None:
        """Its blocks are there."""
        del self.fetched[job.seq]
        job.status = "running"
        self.running.append(job)

    def preempt(self, job: Job, *, is_offloaded: bool = False) -> None:
        """From running to the head of the queue; its blocks are given back, to be computed again or fetched."""
        assert not job.in_flight, f"job {job.seq} is part of a running plan and cannot be evicted"
        self.running.remove(job)
        self._name_blocks(job)
        self._ledger.release(job, job.computed)
        job.num_recomputed -= max(0, job.furthest - job.computed)  # it did not get there again
        job.furthest = max(job.furthest, job.computed)
        job.computed, job.carried = 0, None
        if isinstance(job, CanvasJob):
            job.step = 0
        job.status = "offloaded" if is_offloaded else "waiting"
        job.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push_front(job)

    def _name_blocks(self, job: Job) -> None:
        """Blocks of a prompt whose trace tells no hashes, so that the job may find its own again as a real one does."""
        ledger = self._ledger
        if job.hashes or job.request.scores_prompt or not ledger.has_prefix_cache:
            return
        job.hashes = list(private_hashes(job.id, job.computed // ledger.block_size))
        ledger.register(job, job.computed)

    def finish(
        self,
        now: float,
        job: Job,
        reason: FinishReason,
        sampled: Sampled = NOTHING,
        error: str | None = None,
        code: str | None = None,
    ) -> None:
        """End one answer: free its blocks, tell its caller, write the Finished event."""
        assert job.status != "in_transfer", "its blocks are being written"
        if job.status != "blocked":
            (self.running if job.status == "running" else self.waiting).remove(job)
        self._ledger.release(job, job.computed)
        if job.status == "running":
            job.num_recomputed -= max(0, job.furthest - job.computed)
        request = job.request
        if self.residents is not None and request.adapter is not None:
            self.residents.end(job)
        job.status = "ended"
        self.tell(job, sampled, reason, error, code)
        jobs = self._by_request[request.id]
        jobs.remove(job)
        if not jobs:
            del self._by_request[request.id]
        self._settle(request)
        self._emit(
            Finished(
                at=now,
                who=self._name,
                request=request.id,
                answer=job.answer,
                reason=reason,
                arrived_at=job.arrived_at,
                admitted_at=job.admitted_at,
                first_token_at=job.first_token_at,
                last_token_at=job.last_token_at,
                num_prompt=job.num_prompt,
                num_cached=job.cached,
                num_output=job.num_output,
                num_preemptions=job.num_preemptions,
                tenant=request.tenant,
                priority=request.priority,
                slo=request.slo,
                num_recomputed=job.num_recomputed,
            )
        )

    def tell(
        self,
        job: Job,
        sampled: Sampled,
        reason: FinishReason | None = None,
        error: str | None = None,
        code: str | None = None,
    ) -> None:
        """Note what the caller is to hear; callers who want only the end hear only of it."""
        if not job.is_streamed:
            if reason is not None:
                whole = Output(
                    job.answer, (), job.num_output, reason, (), (), job.cached, error, code,
                    sampled.vector,
                )  # fmt: skip
                self.outputs.append((job.request.id, whole))
            return
        output = Output(
            job.answer,
            sampled.ids,
            sampled.tokens,
            reason,
            sampled.logprobs,
            sampled.prompt_logprobs,
            job.cached,
            error,
            code,
            sampled.vector,
        )
        self.outputs.append((job.request.id, output))

    def check(self) -> None:
        """Recompute the invariants of the lists and of what they hold."""
        fetched = (*self.fetched.values(), *self.held.values())
        listed = [job.seq for job in (*self.running, *self.waiting, *fetched)]
        owing = [job for jobs in self._by_request.values() for job in jobs]
        owed = [job.seq for job in owing if job.status != "blocked"]
        assert sorted(listed) == sorted(owed), "jobs listed and answers owed differ"
        strangers = set(self.images.jobs) - {job.seq for job in owing}
        assert not strangers, "images of jobs that are gone"
        if self.residents is not None:
            self.residents.check([*self.running, *self.waiting, *fetched])
        assert len(set(listed)) == len(listed), "a job stands in two lists"
        holders = (*self.running, *fetched)
        known = {job.seq for job in holders} | self.stand_ins
        assert set(self._ledger.tables) <= known, "a stranger holds blocks"
        for job in holders:
            room = self._ledger.held(job) * self._ledger.block_size
            is_canvas = isinstance(job, CanvasJob)  # computes more than it keeps
            assert is_canvas or job.computed + job.in_flight <= room, (
                f"job {job.seq} outgrew its blocks"
            )
            assert 0 <= job.computed <= job.known, f"job {job.seq} computed the unknown"
        for job in self.waiting:
            assert not job.computed and not job.in_flight, f"waiting job {job.seq} has progress"
