"""The most memory that jobs will come to hold: what admission by future memory asks, whoever guesses the lengths.

Source: Past-Future scheduler (WuSiYu/lightllm-ae, commit d93ff69, ReqQueue._calc_max_token_num_needed).

A job grows by one position a step until it ends, so all memory together grows until one ends: the peak lies at an end.
Sort the jobs by the steps they go on for, longest first. When the i-th ends, those before it are there too:

    M[i] = sum over j <= i of blocks(known[j] + left[i])        peak = max over i of M[i]

    known[j]    positions that j holds in the step being planned
    left[j]     steps that it goes on for after that one; the KV of a last token is never written

The source counts tokens, for which the sum is that of known + i * left[i]. Blocks are counted here just as fast and
exactly: with known[j] + size - 1 = size * p[j] + r[j] and left[i] = size * q[i] + s[i]

    M[i] = (sum over j <= i of p[j]) + i * q[i] + (how many j <= i have r[j] + s[i] >= size)

and a table of the remainders seen so far, size columns wide, answers the last term.

Blocks that several jobs hold are one block: with `shared` = blocks held, each as often as it is held, less those used,
what i of n jobs share is taken to be (i - 1) / (n - 1) of it. That is exact where all share one beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penstock.core.views import JobView, LedgerFork

Guess = Callable[[JobView], int]  # the total output length of a job


def peak_blocks(
    known: NDArray[np.int64], left: NDArray[np.int64], *, size: int, shared: int = 0
) -> float:
    """The peak of at least one job, in blocks of `size` positions."""
    left = np.maximum(left, 0)  # whose time is up ends with the step being planned
    order = np.argsort(-left, kind="stable")
    whole, odd = np.divmod(known[order] + (size - 1), size)
    grown, more = np.divmod(left[order], size)
    num = np.arange(1, len(order) + 1)
    blocks = np.cumsum(whole) + num * grown
    if size > 1:
        seen = np.zeros((len(order), size + 1), dtype=np.int64)
        seen[num - 1, odd] = 1
        at_least = np.cumsum(seen, axis=0)[:, ::-1].cumsum(axis=1)[:, ::-1]
        blocks += at_least[num - 1, size - more]
    if shared:
        return float((blocks - shared * (num - 1) / max(1, len(order) - 1)).max())
    return float(blocks.max())


@dataclass(slots=True)
class Crowd:
    """The jobs that run, and those admitted since the step is planned, with several sets of guesses at their ends."""

    ledger: LedgerFork
    known: list[int] = field(default_factory=list)
    lefts: list[list[int]] = field(default_factory=list)  # one list a set
    admitted: list[JobView] = field(default_factory=list)
    held: int = 0  # blocks of the jobs that run, shared ones as often as they are held

    @classmethod
    def of(
        cls, ledger: LedgerFork, running: Sequence[JobView], guess: Guess, num_sets: int = 1
    ) -> Crowd:
        """Of the jobs that still hold memory: who was evicted in this step has none."""
        held = list(map(ledger.held, running))
        jobs = [job for job, blocks in zip(running, held, strict=True) if blocks]
        done = [job.num_output + 1 for job in jobs]  # with what the step being planned gives
        lefts = [
            [guess(job) - tokens for job, tokens in zip(jobs, done, strict=True)]
            for _ in range(num_sets)
        ]
        return cls(ledger, [job.known for job in jobs], lefts, held=sum(held))

    def peak(self, job: JobView, lefts: Sequence[int]) -> float:
        """The greatest peak of all sets if `job` came too, with what others than these jobs hold."""
        known = np.array([*self.known, job.known])
        free, total, size = self.ledger.free, self.ledger.total, self.ledger.block_size
        adopted = -(-job.known // size) - self.ledger.need(job, job.known)
        shared = self.held + sum(self.ledger.held(each) for each in self.admitted) - (total - free)
        others, shared = max(0, -shared), max(0, shared) + max(0, adopted)
        return others + max(
            peak_blocks(known, np.array([*there, left]), size=size, shared=shared)
            for there, left in zip(self.lefts, lefts, strict=True)
        )

    def add(self, job: JobView, lefts: Sequence[int]) -> None:
        self.admitted.append(job)
        self.known.append(job.known)
        for there, left in zip(self.lefts, lefts, strict=True):
            there.append(left)


def left_of(job: JobView, guess: Guess) -> int:
    """Steps that a job goes on for after the one being planned."""
    return guess(job) - job.num_output - 1
