"""Longest prefix match first: who finds most of its prompt in the prefix cache goes next.

Source: SGLang schedule policy lpm (sglang 0.5.23, srt/managers/schedule_policy.py); L. Zheng et al., "SGLang", 2024,
where for equal memory this order is shown to reach the best hit rate offline.

Idea: what is cached now may be thrown out before its turn comes, so serve those first who can use it. And of several
newcomers that begin alike, let one go ahead and fill the cache for the others.

    rank by    cached positions, most first; then those put off, in their order
    put off    a job with at most `checked_tokens` cached whose prompt shares its first `shared_tokens` with one that
               stands before it and was not put off
    more than `most_waiting` jobs wait: arrival order, since looking all of them up would take too long

Parameters
    most_waiting     jobs, default 128
    checked_tokens   default 32
    shared_tokens    default 32; in whole blocks, rounded up

Where we differ: SGLang matches token by token in a radix tree, this file block by block through the ledger. Equals go
in arrival order. Jobs whose prompts are cached nowhere may starve while others match, as there. Where the view has no
ledger nothing counts as cached. What a call takes grows with the blocks found, of at most `most_waiting` jobs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from penstock.core.types import BlockHash
from penstock.core.views import JobView, LedgerFork
from penstock.policy.order import STABLE, Decision, View


@dataclass(slots=True)
class Lpm:
    most_waiting: int = 128
    checked_tokens: int = 32
    shared_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("most_waiting", "shared_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.checked_tokens < 0:
            raise ValueError(f"checked_tokens must not be negative, got {self.checked_tokens}")

    def decide(self, view: View) -> Decision:
        waiting = view.waiting
        if len(waiting) > self.most_waiting:
            return Decision(waiting, f"{len(waiting)} wait: arrival order", STABLE)
        if view.ledger is None or len(waiting) < 2:
            return Decision(waiting, stable_for=STABLE)
        fork = view.ledger.fork()
        cached = {job.seq: fork.cached(job) for job in waiting}
        put_off = self._put_off(waiting, cached, fork)
        ranked = sorted(waiting, key=lambda job: (job.seq in put_off, -cached[job.seq]))
        return Decision(ranked, f"{len(put_off)} put off" if put_off else "")

    def _put_off(
        self, waiting: Iterable[JobView], cached: dict[int, int], fork: LedgerFork
    ) -> set[int]:
        """Jobs that begin like one before them. A hash names all that is before it, so one a prompt tells."""
        size = fork.block_size
        place = -(-self.shared_tokens // size) - 1
        seen: set[BlockHash | str] = set()
        put_off: set[int] = set()
        for job in waiting:
            if cached[job.seq] > self.checked_tokens or job.num_prompt // size <= place:
                continue
            begins = self._begins(job, size, place)
            if begins is None:
                continue
            if begins in seen:
                put_off.add(job.seq)
            else:
                seen.add(begins)
        return put_off

    @staticmethod
    def _begins(job: JobView, size: int, place: int) -> BlockHash | str | None:
        """What names the beginning of a prompt; the answers of one request share theirs, whatever is known of it."""
        request = job.request
        if request.kind == "score" or request.sampling.prompt_logprobs is not None:
            return None
        hashes = request.prompt.blocks(size)
        if len(hashes) > place:
            return hashes[place]
        return request.id if request.n > 1 else None
