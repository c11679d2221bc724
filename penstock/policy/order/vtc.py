"""Fair among tenants: whoever has been served least goes next: the virtual token counter.

Source: Y. Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (VTC, algorithm 2; weights: section
4.4).

Idea: count what each tenant was served, in weighted tokens, and let the backlogged tenant with the least count have the
next place. Counting tokens as they are served needs no guess at the length of answers. A tenant that comes back after a
pause is lifted to the others' level, since what it did not ask for meanwhile is no credit.

    count(t)  += prompt_weight * prompt / share(t)    when a job of t is admitted
    count(t)  += output_weight / share(t)             for every token of an answer
    t returns: count(t) := max(count(t), least count of the backlogged tenants);
               when nobody waits, of whoever was the last to have a job admitted

Any two tenants that stay backlogged are served alike up to 2 * max(prompt_weight * longest prompt, output_weight * M)
weighted tokens, however long that is, where M is what the running jobs can hold.

Parameters
    prompt_weight   of a prompt token, default 1
    output_weight   of an answer's token, default 2 (the usual ratio of prices)
    shares          a tenant's part relative to others', by name, default 1 each: shares.NAME = 2 gets twice as much

Where we differ: a job's prompt is charged once, though a preempted one computes it again; and whole, cached or not.
Batch policies that pass over the head of the line may take others. Counters of tenants without jobs are forgotten when
the lift would bring them to the same level anyway."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from penstock.core.events import Event, Finished
from penstock.core.moving import Departed
from penstock.policy.order import STABLE, Decision, View, in_order
from penstock.policy.order.tenants import Books, check_weights

FORGOTTEN_AT = 256  # counters kept before idle ones are looked at, and twice what was kept then


@dataclass(slots=True)
class Vtc:
    prompt_weight: float = 1.0
    output_weight: float = 2.0
    shares: dict[str, float] = field(default_factory=dict)
    _counts: dict[str, float] = field(init=False, default_factory=dict, repr=False)
    _books: Books = field(init=False, repr=False, compare=False)
    _most: int = field(init=False, default=FORGOTTEN_AT, repr=False)

    def __post_init__(self) -> None:
        check_weights(self.prompt_weight, self.output_weight, self.shares)
        weights = self.prompt_weight, self.output_weight
        self._books = Books(self._lift, self._charge, self._charge, *weights)

    def observe(self, event: Event) -> None:
        self._books.hear(event)
        if len(self._counts) > self._most and isinstance(event, Finished | Departed):
            self._forget()

    def decide(self, view: View) -> Decision:
        waiting = view.waiting
        lines = self._books.lines(view)
        if len(lines.tenants) < 2:
            return Decision(waiting, stable_for=STABLE)
        shares = np.array([self.shares.get(tenant, 1.0) for tenant in lines.tenants])
        counts = np.array([self._counts.get(tenant, 0.0) for tenant in lines.tenants])
        reached = counts[lines.owner] + lines.ahead / shares[lines.owner]
        ranks = np.argsort(reached, kind="stable")
        why = f"{lines.tenants[lines.owner[ranks[0]]]} was served least"
        return Decision(in_order(waiting, ranks), why)

    def _charge(self, tenant: str, tokens: float) -> None:
        share = self.shares.get(tenant, 1.0)
        self._counts[tenant] = self._counts.get(tenant, 0.0) + tokens / share

    def _level(self) -> float:
        """What a tenant that returns now is lifted to."""
        counts, books = self._counts, self._books
        if books.num_waiting:
            return min(counts.get(tenant, 0.0) for tenant in books.num_waiting)
        return 0.0 if books.last_served is None else counts.get(books.last_served, 0.0)

    def _lift(self, tenant: str) -> None:
        self._counts[tenant] = max(self._counts.get(tenant, 0.0), self._level())

    def _forget(self) -> None:
        level, books = self._level(), self._books
        kept = books.tenants() | {books.last_served}
        self._counts = {
            tenant: count
            for tenant, count in self._counts.items()
            if count > level or tenant in kept
        }
        self._most = max(FORGOTTEN_AT, 2 * len(self._counts))
