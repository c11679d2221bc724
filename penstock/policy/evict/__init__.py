"""What leaves fast memory, and where to?

Asked by stores that run short: by the batch policy about running jobs (`need` blocks for `asker`), and by the
block ledger about cached blocks nobody uses (asker None). `items` may be lazy and long: take what is needed.

A policy that answers every question about cached blocks with just the first `need` of them may say so by a class
variable `takes_oldest = True`; then it need not be asked.

Law: items come from the list, each once; they free at least `need`, or everything that could be freed leaves, or
the asker itself is among them (it gives up for now).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from penstock.core.views import BlockView, Eviction, JobView, LedgerFork, Rng

Item = JobView | BlockView


@dataclass(slots=True)
class View:
    """`items`: running jobs in the order of admission, or cached blocks from the longest unused to the latest.

    `freed(item)`: blocks that become free when the item leaves (a job's shared blocks do not count).
    `ledger`: the fork that the asker plans on; None about cached blocks.
    """

    now: float
    rng: Rng
    need: int
    asker: JobView | None
    items: Iterable[Item]
    freed: Callable[[Item], int]
    ledger: LedgerFork | None = None


@dataclass(slots=True)
class Decision:
    evictions: tuple[Eviction[Item], ...]
    why: str = ""


def law(view: View, decision: Decision) -> None:
    offered = list(view.items)
    chosen = [eviction.item for eviction in decision.evictions]
    assert len({id(item) for item in chosen}) == len(chosen), "an item leaves twice"
    assert all(any(item is other for other in offered) for item in chosen), "an item nobody offered"
    if any(item is view.asker for item in chosen) or len(chosen) == len(offered):
        return
    freed = sum(view.freed(item) for item in chosen)
    assert freed >= view.need, f"{freed} blocks freed, {view.need} needed"


def take(view: View, ranked: Iterable[Item], *, stops_at_asker: bool = False) -> Decision:
    """Take items in the given order until they free enough, or until the asker itself gave up."""
    taken: list[Eviction[Item]] = []
    freed = 0
    for item in ranked:
        if freed >= view.need:
            break
        taken.append(Eviction(item))
        freed += view.freed(item)
        if stops_at_asker and item is view.asker:
            return Decision(tuple(taken), "the asker gives up")
    return Decision(tuple(taken), f"{freed} of {view.need} blocks")


def take_or_give_up(view: View, ranked: Iterable[Item]) -> Decision:
    """Take items in the given order until they free enough; if the asker's turn comes before, it alone leaves."""
    taken: list[Eviction[Item]] = []
    freed = 0
    for item in ranked:
        if freed >= view.need:
            break
        if item is view.asker:
            return Decision((Eviction(item),), "the asker gives up")
        taken.append(Eviction(item))
        freed += view.freed(item)
    return Decision(tuple(taken), f"{freed} of {view.need} blocks")


class Policy(Protocol):
    def decide(self, view: View) -> Decision: ...
