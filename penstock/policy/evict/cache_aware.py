"""Preempt whose blocks are cheapest to get back, when positions that stay in the prefix cache cost nothing.

Source: own; the price is that of cheapest-per-block, with what prefix caching (vLLM v1, SGLang) leaves of a preempted
job taken off.

Idea: a preempted job looks up its own prefix when it comes back. Blocks that other jobs hold are surely still there.
Blocks that only the job held stay by name until somebody takes them: the needed ones go at once, of the rest a share.

    stays(job) = shared blocks + kept * max(0, freed - needed)           shared = held - freed
    price(job) = (computed - block size * stays) / min(freed, needed)    tokens a block

Parameters: kept (of the blocks nobody needs at once, the share still there when the job comes back; 0 to 1, default 0:
under the pressure that preempts, growing jobs soon take them).

Where we differ: nothing to differ from. It is cheapest-per-block where the view has no ledger and where nothing is
shared and kept is 0. Asked about cached blocks (no asker) it takes them as offered, the longest unused first. Every
running job is looked at, once for each preemption and only then: some microseconds each.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.views import JobView
from penstock.policy.evict import Decision, View, take, take_or_give_up
from penstock.policy.evict.cheapest_per_block import by_price


@dataclass(slots=True)
class CacheAware:
    kept: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.kept <= 1:
            raise ValueError(f"kept must be from 0 to 1, got {self.kept}")

    def decide(self, view: View) -> Decision:
        if view.asker is None:
            return take(view, view.items)
        ledger = view.ledger

        def cost(job: JobView, freed: int) -> float:
            if ledger is None:
                return job.computed
            stays = ledger.held(job) - freed + self.kept * max(0, freed - view.need)
            return max(0.0, job.computed - ledger.block_size * stays)

        return take_or_give_up(view, by_price(view, cost))
