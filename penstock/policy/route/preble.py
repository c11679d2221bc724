"""Go to the cache when most of the prompt is there, else to where the whole work is least.

Source: Preble (Srivatsa et al., ICLR 2025), E2: exploitation plus exploration.

Idea: a long hit is worth more than balance, since it is work that nobody does; a short one is only one cost of several.

    exploit   more than `threshold` of the prompt is held somewhere: of those that hold the most, the least cost
    explore   else the least cost of all:
              cost(i) = queue_s(i) + prefill(prompt - hit(i) | hit(i)) + eviction(i)
              eviction(i) = what it takes to compute again what i must forget to make room, at most the prompt
    balance   where the best of those that hold it costs more than `balance` times the least of all, exploiting gives
              way to exploring, so that a beginning that everybody has gets a second place

Parameters
    threshold   share of the prompt, default 0.5        balance   default 3; None: never

Where we differ: their balance compares the loads of the busiest and the idlest replica, with a bound tuned to the
workload. their load is a sum over a window of three minutes of history, ours is what waits now, by prediction.
Their eviction cost counts what single prefixes are used; ours, how many cached blocks must go. Prefixes are not copied
ahead of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add
from typing import ClassVar

from penstock.core.types import Report
from penstock.policy.route import Decision, View
from penstock.policy.route.pick import Turns


@dataclass(slots=True)
class Preble:
    needs_blocks: ClassVar[bool] = True
    needs_cost: ClassVar[bool] = True
    threshold: float = 0.5
    balance: float | None = 3.0
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
        hits = view.hits(able)
        costs = _costs_s(view, able, hits)
        most, prompt = max(hits), view.request.prompt.num_tokens
        names = view.names(able)
        if most > self.threshold * prompt:
            held = [place for place, hit in enumerate(hits) if hit == most]
            among = [costs[place] for place in held]
            if self.balance is None or min(among) <= self.balance * min(costs):
                chosen = self._turns.least([names[place] for place in held], among)
                return Decision(chosen, f"{most} of {prompt} tokens held; {min(among):.2f} s")
        return Decision(self._turns.least(names, costs), f"explore; {min(costs):.2f} s")


def _costs_s(view: View, able: Sequence[Report], hits: Sequence[int]) -> list[float]:
    num, token_s = view.request.prompt.num_tokens, view.token_s
    costs = list(map(add, view.queues_s(able), view.prefills_s(hits)))
    for place, (report, hit) in enumerate(zip(able, hits, strict=True)):
        over = num - hit - report.free_blocks * report.block_size
        if over > 0 and report.total_blocks:
            costs[place] += token_s * over
    return costs
