"""May it start now? Asked by the batch policy for one waiting job, on the fork it plans on.

Law: "yes" implies that the next step fits in memory. "later" = ask again; "no" = never, the request is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.core.views import Answer, JobView, LedgerFork, Lengths, Rng


@dataclass(slots=True)
class View:
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


@dataclass(slots=True)
class Decision:
    answer: Answer
    why: str = ""


def law(view: View, decision: Decision) -> None:
    assert decision.answer in ("yes", "no", "later"), decision.answer
    if decision.answer == "yes":
        need, free = view.ledger.need(view.job, view.upto), view.ledger.free
        assert need <= free, f"admitted job {view.job.seq} needs {need} blocks, {free} are free"


def can_ever_fit(job: JobView, ledger: LedgerFork) -> bool:
    """False for a job that could outgrow the whole memory. The KV of the very last token is never written."""
    longest = job.num_prompt + job.max_tokens - 1
    return -(-longest // ledger.block_size) <= ledger.total


class Policy(Protocol):
    def decide(self, view: View) -> Decision: ...
