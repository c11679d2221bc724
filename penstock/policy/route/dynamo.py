"""The least cost in blocks: what has to be computed there, less what is held there, and what decodes there.

Source: NVIDIA Dynamo, KV router (ai-dynamo 1.6.1).

Idea: cached blocks and load are both blocks, so that they can be added up in one cost without a threshold.

    logit(i)    = prefill_weight * max(0, P(i) - credit(i)) + D(i) + active_weight * active(i)
    P(i)        blocks of prompts to compute there, with this one
    D(i)        blocks that decodes would hold there, with this one
    credit(i)   = overlap_weight * decay(i) * blocks of the prompt on its device
                  + host_weight * those behind them in host memory + disk_weight * those behind these on disk
    decay(i)    = 1 / (1 + queue_decay * excess(i) / blocks of the prompt)
    excess(i)   = P(i) above the least P
    chosen      the least logit, at random among equals; with a `temperature`, drawn by the soft maximum of the negated
                and spread logits

Parameters
    overlap_weight   default 1        prefill_weight   default 1        active_weight   default 0
    queue_decay      default 0        temperature      default 0
    host_weight      default 0.75     disk_weight      default 0.25

Where we differ: nothing is shared by all workers, which Dynamo credits too. Its queue before the router (all workers
above 16 batches) is the gateway's bound here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from operator import add
from typing import ClassVar

from penstock.core.types import Report
from penstock.core.views import Rng
from penstock.policy.loads import Sent
from penstock.policy.route import Decision, View
from penstock.policy.route.pick import spread, with_behind


def decode_tokens(report: Report, _: Sent) -> int:
    return report.decode_tokens


@dataclass(slots=True)
class Dynamo:
    needs_blocks: ClassVar[bool] = True
    overlap_weight: float = 1.0
    prefill_weight: float = 1.0
    active_weight: float = 0.0
    queue_decay: float = 0.0
    temperature: float = 0.0
    host_weight: float = 0.75
    disk_weight: float = 0.25

    def __post_init__(self) -> None:
        numbers = (self.overlap_weight, self.prefill_weight, self.active_weight, self.queue_decay)
        if min(*numbers, self.temperature, self.host_weight, self.disk_weight) < 0:
            raise ValueError("weights, queue_decay and temperature must not be negative")

    def decide(self, view: View) -> Decision:
        able = view.candidates()
        if not able:
            return Decision(None, "no replica can take it")
        costs = self._costs(view, able)
        place = draw(costs, self.temperature, view.rng)
        return Decision(able[place].replica, f"cost {costs[place]:.1f} blocks")

    def _costs(self, view: View, able: Sequence[Report]) -> list[float]:
        size = able[0].block_size
        blocks = view.request.prompt.num_tokens / size
        pending = [tokens / size + blocks for tokens in view.pendings(able)]
        overlap, weight = self.overlap_weight, self.prefill_weight
        credits: Sequence[float] = [overlap * held for held in view.held(able)]
        if self.queue_decay:
            least, decay = min(pending), self.queue_decay
            pairs = zip(credits, pending, strict=True)
            credits = [credit / (1 + decay * (more - least) / blocks) for credit, more in pairs]
        credits = with_behind(view, able, credits, self.host_weight, self.disk_weight)
        triples = zip(view.loads(decode_tokens, able), pending, credits, strict=True)
        costs = [
            tokens / size + blocks + weight * (prefill - credit if prefill > credit else 0)
            for tokens, prefill, credit in triples
        ]
        if self.active_weight:
            names = view.names(able)
            active = [self.active_weight * view.outstanding.get(name, 0) for name in names]
            costs = list(map(add, costs, active))
        return costs


def draw(costs: Sequence[float], temperature: float, rng: Rng) -> int:
    """The place of the least, at random among equals; with a temperature, of one drawn by how little it costs."""
    if not temperature:
        least = min(costs)
        if costs.count(least) == 1:
            return costs.index(least)
        equals = [place for place, cost in enumerate(costs) if cost == least]
        return equals[rng.randrange(len(equals))]
    weights = [exp(-cost / temperature) for cost in spread(costs)]
    point = rng.random() * sum(weights)
    for place, weight in enumerate(weights):
        point -= weight
        if point <= 0:
            return place
    return len(weights) - 1
