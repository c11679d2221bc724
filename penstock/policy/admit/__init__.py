"""May it start now? Asked by the batch policy for one waiting job, on the fork it plans on.

Law: "yes" implies that the next step fits in memory. "later" = ask again; "no" = never, the request is refused.

**How long "later" stands.** `stable_for` says for how many steps, this one included, the job would be told the same if
nothing arrived and nobody ended while those who run write one token a step each. Meanwhile memory only shrinks, so a
job for which there is too little of it is refused until somebody ends: STABLE. Steps for which all answers stand run as
one, and the policy hears only afterwards, as an event, how many there were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from penstock.core.records import Record
from penstock.core.views import Answer, JobView, LedgerFork, Lengths, Rng

STABLE = 1 << 30  # steps: until somebody arrives, ends or leaves


class View(Record):
    """`tokens`: positions the next step would compute for `job`, after those found in the prefix cache."""

    now: float
    rng: Rng
    job: JobView
    tokens: int
    ledger: LedgerFork
    running: Sequence[JobView]
    lengths: Lengths

    @property
    def upto(self) -> int:
        """Positions the job would hold after the next step."""
        return self.ledger.cached(self.job) + self.tokens


class Decision(Record):
    """`stable_for`: of "later"; other answers change what runs."""

    answer: Answer
    why: str = ""
    stable_for: int = 1


def law(view: View, decision: Decision) -> None:
    assert decision.answer in ("yes", "no", "later"), decision.answer
    assert decision.stable_for >= 1, "stable_for counts this step, so it is at least 1"
    if decision.answer == "yes":
        need, free = view.ledger.need(view.job, view.upto), view.ledger.free
        assert need <= free, f"admitted job {view.job.seq} needs {need} blocks, {free} are free"


def can_ever_fit(job: JobView, ledger: LedgerFork) -> bool:
    """False for a job that could outgrow the whole memory. The KV of the very last token is never written."""
    longest = job.num_prompt + job.max_tokens - 1
    return -(-longest // ledger.block_size) <= ledger.total


def cannot_start(view: View) -> Decision | None:
    """The answer where the job's known positions do not fit now, or it can outgrow the memory; else None."""
    ledger, job = view.ledger, view.job
    if not can_ever_fit(job, ledger):
        return Decision("no", "can outgrow the whole memory")
    need, free = ledger.need(job, job.known), ledger.free
    if need > free:
        return Decision("later", f"needs {need} blocks, {free} free", STABLE)
    return None


class Policy(Protocol):
    def decide(self, view: View) -> Decision: ...
