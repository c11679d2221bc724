"""Preempt whose blocks are cheapest to get back: fewest tokens to compute again for each block that is needed.

Source: own; greedy rule of the knapsack cover problem (V. Chvatal, "A greedy heuristic for the set-covering problem",
Math. of Operations Research 4(3), 1979: within a factor ln(need) + 1 of the least cost).

Idea: what a preemption costs is the prefill that is done again, what it gives is blocks. A job whose prefix others hold
gives few; a job that is larger than the need gives blocks nobody asked for, and these do not count.

    price(job) = computed / min(freed(job), blocks still needed)       tokens a block

Take the cheapest, lower the need by what it frees, price the others again. A job that frees nothing has no price and
goes last. The asker competes like all others: when its turn comes it gives up, alone.

Parameters: none.

Where we differ: nothing to differ from. Positions found in the prefix cache later are priced as if they were lost;
cache-aware knows better. Asked about cached blocks (no asker) it takes them as offered, the longest unused first.
Every running job is looked at, once for each question: about a microsecond each to count what it frees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import cast

import numpy as np

from penstock.core.views import JobView
from penstock.policy.evict import Decision, View, take, take_or_give_up


@dataclass(slots=True)
class CheapestPerBlock:
    def decide(self, view: View) -> Decision:
        if view.asker is None:
            return take(view, view.items)
        return take_or_give_up(view, by_price(view, lambda job, freed: job.computed))


def by_price(view: View, cost: Callable[[JobView, int], float]) -> Iterable[JobView]:
    """Jobs from the cheapest on, priced again as the need shrinks. `cost(job, blocks it frees)` in tokens."""
    jobs = list(cast(Iterable[JobView], view.items))
    frees = np.array([view.freed(job) for job in jobs], dtype=np.int64)
    costs = np.array(list(map(cost, jobs, frees.tolist())), dtype=np.float64)
    seqs = np.array([job.seq for job in jobs], dtype=np.int64)
    ranks = np.lexsort((-seqs, costs))  # equals in price go in this order
    frees, costs = frees[ranks], costs[ranks]
    gives = frees > 0
    need = view.need
    while gives.any():
        blocks = np.clip(frees, 1, max(1, need))
        best = int(np.where(gives, costs / blocks, inf).argmin())
        gives[best] = False
        need -= int(frees[best])
        yield jobs[ranks[best]]
    yield from (jobs[place] for place in ranks[frees == 0].tolist())
