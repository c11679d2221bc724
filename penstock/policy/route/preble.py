"""Go to the cache when most of the prompt is there, else to where the whole work is least.

Source: Preble (Srivatsa et al., ICLR 2025), E2: exploitation plus exploration.

Idea: a long hit is worth more than balance, since it is work that nobody does; a short one is only one cost of several.

    exploit   more than `threshold` of the prompt is held somewhere: of those that hold the most, the least cost
    explore   else the least cost of all:
              cost(i) = queue_s(i) + prefill(prompt - hit(i) | hit(i)) + eviction(i)
              eviction(i) = what it takes to compute again what i must forget to make room, at most the prompt
    balance   when the busiest has more than `balance` times the queue of the idlest, exploiting there gives way to
              exploring

Parameters
    threshold   share of the prompt, default 0.5        balance   default None: never (theirs is tuned to a workload)

Where we differ: their load is a sum over a window of three minutes of history, ours is what waits now, by prediction.
Their eviction cost counts what single prefixes are used; ours, how many cached blocks must go. Prefixes are not copied
ahead of time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from penstock.core.types import Report
from penstock.policy.route import Decision, View
from penstock.policy.route.pick import Turns


@dataclass(slots=True)
class Preble:
    needs_blocks: ClassVar[bool] = True
    needs_cost: ClassVar[bool] = True
    threshold: float = 0.5
    balance: float | None = None
    _turns: Turns = field(init=False, compare=False, repr=False, default_factory=Turns)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold}")
        if self.balance is not None and not self.balance > 1:
            raise ValueError(f"balance must be above 1, got {self.balance}")

    def decide(self, view: View) -> Decision:
        able = view.candidates()
        if not able:
            return Decision(None, "no replica can take it")
        hits = [view.hit(report) for report in able]
        most, prompt = max(hits), view.request.prompt.num_tokens
        exploits = most > self.threshold * prompt and not self._is_lopsided(view, able)
        among = [
            (report, hit)
            for report, hit in zip(able, hits, strict=True)
            if hit == most or not exploits
        ]
        costs = [_cost_s(view, report, hit) for report, hit in among]
        chosen = self._turns.least([report.replica for report, _ in among], costs)
        told = f"{most} of {prompt} tokens held" if exploits else "explore"
        return Decision(chosen, f"{told}; {min(costs):.2f} s")

    def _is_lopsided(self, view: View, able: list[Report]) -> bool:
        if self.balance is None:
            return False
        queues = [view.queue_s(report) for report in able]
        return max(queues) > self.balance * max(min(queues), view.token_s)


def _cost_s(view: View, report: Report, hit: int) -> float:
    new = view.request.prompt.num_tokens - hit
    prefill_s = 0.0 if view.cost is None else view.cost.prefill_s(new, hit)
    over = max(0, new - report.free_blocks * report.block_size) if report.total_blocks else 0
    return view.queue_s(report) + prefill_s + view.token_s * over
