"""Forwards of one size: prompts are split and fused with the running decodes: Dynamic SplitFuse.

Source: DeepSpeed-FastGen (DeepSpeed-MII commit 8abdd98, mii/batching/ragged_batching.py; DeepSpeed inference v2 commit
edaa722), and C. Holmes et al., "DeepSpeed-FastGen", 2024.

Idea: what a forward takes depends on how many tokens are in it and hardly on whose they are. Throughput is concave in
that number, so forwards of equal size give the most tokens a second, and no decode waits behind a long prompt.

    1  generating jobs first, one token each, if the last block has room or a block is free; one that gets none is
       passed over
    2  then prompts, unfinished ones before those that wait: the blocks of the *whole* rest of the prompt must be free,
       otherwise nobody starts; n = min(rest, budget left). A prompt that is cut keeps the front, and ends the walk
    3  if nothing can run although jobs hold memory, the last of them leaves: all of it is computed again

Parameters
    max_tokens      tokens of one forward, default 768 (max_ragged_batch_size)
    max_sequences   jobs in one forward, default 512 (max_ragged_sequence_count). Where more generate, those without a
                    token for longest go first
    max_jobs        jobs that hold memory, default 2048 (max_tracked_sequences)
    splits_evenly   default False; True computes a backlog of T prompt tokens, with room for r beside the decodes, in
                    ceil(T / r) equal pieces instead of all full but the last (our reading of "equal forwards are best")

Where we differ: who leaves is the evict policy's answer (recompute-last gives FastGen's), and the place of whoever left
is the order policy's (requeue gives FastGen's: the tail). The admit policy is asked besides, so that jobs that can
never fit are refused. Cached prefixes are used where the replica keeps them; FastGen has none. No memory is set aside:
what FastGen reserves for the forward itself is not part of the ledger."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from penstock.core.views import Batch, Chunk, Eviction, JobView, Lane, LedgerFork
from penstock.policy.batch import STABLE, Decision, View
from penstock.policy.batch.decodes import all_decodes

FAR = 8  # forwards ahead from which on an even split is as good as a full one


@dataclass(slots=True)
class Forward:
    """One forward in the making: `tokens_left` and `places_left` of it."""

    fork: LedgerFork
    tokens_left: int
    places_left: int
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[JobView] = field(default_factory=list)
    is_blocked: bool = False  # the next prompt waits for memory
    is_held: bool = False  # it waits, for whatever reason the admit policy has

    @property
    def is_full(self) -> bool:
        return self.tokens_left < 1 or self.places_left < 1

    def add(self, job: JobView, start: int, tokens: int) -> bool:
        """Book positions [start, start + tokens); False, and nothing is booked, when memory is short."""
        if not self.fork.reserve(job, start + tokens):
            return False
        self.chunks.append(Chunk(job, tokens))
        self.tokens_left -= tokens
        self.places_left -= 1
        return True

    def has_room_for_all_of(self, job: JobView) -> bool:
        return self.fork.need(job, job.known) <= self.fork.free


@dataclass(slots=True)
class SplitFuse:
    max_tokens: int = 768
    max_sequences: int = 512
    max_jobs: int = 2048
    splits_evenly: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_sequences", "max_jobs"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def decide(self, view: View) -> Decision:
        if view.busy_lanes:
            return Decision(why="the lane is busy")
        running, caps = view.running, view.caps
        tokens = min(self.max_tokens, caps.max_batch_tokens)
        slots = min(self.max_jobs, caps.max_jobs) - len(running)
        may_start = len(view.waiting) > 0 and slots > 0
        forward = Forward(view.ledger.fork(), tokens, self.max_sequences)
        decodes = None
        if len(running) <= min(tokens, self.max_sequences):
            decodes = all_decodes(running, forward.fork)
        if decodes and not may_start:
            return Decision(Batch((Lane(decodes),)), stable_for=STABLE, outlasts=not view.waiting)
        if decodes is None:
            forward.fork = view.ledger.fork()
            self._generate(running, forward)
        else:
            forward.tokens_left -= len(decodes)
            forward.places_left -= len(decodes)
        if self.splits_evenly:
            self._even_out(view, forward)
        if (decodes or self._go_on(running, forward)) and may_start:
            self._start(view, forward, slots)
        if running and not (decodes or forward.chunks):
            return self._unstick(view)
        chunks = (*(decodes or ()), *forward.chunks) if forward.chunks else decodes
        is_stable = (
            decodes
            and not forward.chunks
            and (forward.is_full or forward.is_blocked or forward.is_held)
        )
        return Decision(
            Batch((Lane(chunks),) if chunks else ()),
            tuple(forward.admitted),
            (),
            "waits for memory" if forward.is_blocked else "",
            STABLE if is_stable else 1,
            len(running) + len(forward.admitted) <= min(tokens, self.max_sequences),
        )

    @staticmethod
    def _generate(running: Iterable[JobView], forward: Forward) -> None:
        """One token of each generating job that gets a position for it."""
        jobs = [job for job in running if job.todo == 1]
        if len(jobs) > min(forward.tokens_left, forward.places_left):
            jobs.sort(key=lambda job: job.last_token_at or job.arrived_at)
        for job in jobs:
            if forward.is_full:
                return
            forward.add(job, job.known - 1, 1)

    @staticmethod
    def _even_out(view: View, forward: Forward) -> None:
        """Lower the budget to an equal share of the prompt tokens to come."""
        room, backlog = forward.tokens_left, 0
        if room < 1:
            return
        for job in (*view.running, *view.waiting):
            if job.todo > 1:
                backlog += job.todo
                if backlog > FAR * room:
                    return
        if backlog:
            forward.tokens_left = -(-backlog // -(-backlog // room))

    @staticmethod
    def _go_on(running: Iterable[JobView], forward: Forward) -> bool:
        """The next piece of prompts begun before; whether prompts that wait may follow."""
        for job in running:
            if job.todo < 2:
                continue
            if forward.is_full:
                return False
            tokens = min(job.todo, forward.tokens_left)
            start = job.computed + job.in_flight
            if not (forward.has_room_for_all_of(job) and forward.add(job, start, tokens)):
                forward.is_blocked = True
                return False
        return True

    @staticmethod
    def _start(view: View, forward: Forward, slots: int) -> None:
        fork = forward.fork
        for job in view.waiting:
            if forward.is_full or len(forward.admitted) >= slots:
                return
            cached = fork.cached(job)
            rest = job.known - cached
            tokens = min(rest, forward.tokens_left)
            answer = view.admit(job, tokens, fork)
            if answer == "no":
                continue
            if not forward.has_room_for_all_of(job):
                forward.is_blocked = True
                return
            forward.is_held = answer == "later"
            if forward.is_held or not forward.add(job, cached, tokens):
                return
            forward.admitted.append(job)
            if tokens < rest:
                return

    @staticmethod
    def _unstick(view: View) -> Decision:
        """Memory is full of jobs none of which can go on: somebody leaves, and the replica asks again."""
        fork = view.ledger.fork()
        asker = view.running[0]
        need = max(1, fork.need(asker, asker.known) - fork.free)
        evicted: list[Eviction[JobView]] = []
        for eviction in view.victims(asker, need, view.running, fork):
            evicted.append(eviction)
            if fork.release(eviction.item) > 0:
                break  # one at a time: whoever is left may be able to go on now
        return Decision(evicted=tuple(evicted), why="nobody can go on")
