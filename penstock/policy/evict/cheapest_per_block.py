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
Running jobs are looked at from
the one with fewest positions on, until none that follows can be cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import cast

from penstock.core.views import JobView
from penstock.policy.evict import Decision, View, take, take_or_give_up


@dataclass(slots=True)
class Offer:
    """What one job's leaving costs and gives."""

    job: JobView
    cost: float
    freed: int

    def price(self, need: int) -> tuple[float, float, int]:
        """A block, at most `need` of them counting; equals by cost, then by the later arrival."""
        price = self.cost / min(self.freed, need) if self.freed else inf
        return price, self.cost, -self.job.seq


@dataclass(slots=True)
class CheapestPerBlock:
    def decide(self, view: View) -> Decision:
        if view.asker is None:
            return take(view, view.items)
        ranked = by_price(
            view, cost=lambda job, freed: job.computed, least=lambda job: job.computed
        )
        return take_or_give_up(view, ranked)


def by_price(
    view: View, *, cost: Callable[[JobView, int], float], least: Callable[[JobView], float]
) -> Iterable[JobView]:
    """Jobs from the cheapest on, priced again as the need shrinks.

    `cost(job, blocks it frees)` in tokens is never below `least(job)`: counting what a job frees takes time, so those
    that cannot be the cheapest are not looked at.
    """
    unseen = sorted(cast(Iterable[JobView], view.items), key=least, reverse=True)
    offers: list[Offer] = []
    need = view.need
    while unseen or offers:
        wanted = max(1, need)
        best = min(offers, key=lambda offer: offer.price(wanted), default=None)
        while unseen and (best is None or least(unseen[-1]) / wanted <= best.price(wanted)[0]):
            job = unseen.pop()
            freed = view.freed(job)
            offer = Offer(job, cost(job, freed), freed)
            offers.append(offer)
            if best is None or offer.price(wanted) < best.price(wanted):
                best = offer
        assert best is not None
        offers.remove(best)
        need -= best.freed
        yield best.job
