"""Weighted scores: how much of the prompt a replica holds, how long its queue is, how full its memory.

Source: llm-d inference scheduler (endpoint picker of the Gateway API inference extension): filters, scorers, picker.

Idea: whatever is worth knowing about a replica becomes a number between 0 and 1, and a weight says how much it counts.

    prefix   blocks held in a row / blocks of the prompt
    load     queue 0 -> 0.5, else 0.5 * (1 - min(queue, 128) / 128)
    queue    1 for the shortest queue, 0 for the longest, the others between
    kv       1 - share of KV memory in use
    score    sum of weight * scorer; the highest wins

    affinity filter   those that hold at least `keep_match` of the prompt stay alone, but for one decision in `explore`
                      of all, and unless the best of them would answer more than `break_s` later than the best of all

Parameters
    prefix, load, queue, kv   weights, defaults 2, 1, 0, 0 (its sample for shared prefixes; 10 for prefix is another)
    keep_match   default 0.8; None: no affinity filter        explore   default 0.01        break_s   default 5

Where we differ: the queue is what the replica reported as waiting and what was sent since. Two profiles (prefill and
decode) are the fleet's two stages, each with a policy of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import add
from typing import ClassVar

from penstock.core.types import Report
from penstock.policy.loads import Sent, num_waiting, told_kv_ratio
from penstock.policy.route import Decision, View
from penstock.policy.route.pick import Turns, filtered, scored, spread

LONG_QUEUE = 128


@dataclass(slots=True)
class LlmD:
    needs_blocks: ClassVar[bool] = True
    needs_cost: ClassVar[bool] = True
    prefix: float = 2.0
    load: float = 1.0
    queue: float = 0.0
    kv: float = 0.0
    keep_match: float | None = 0.8
    explore: float = 0.01
    break_s: float = 5.0
    _turns: Turns = field(init=False, compare=False, repr=False, default_factory=Turns)

    def __post_init__(self) -> None:
        if min(self.prefix, self.load, self.queue, self.kv, self.break_s) < 0:
            raise ValueError("weights and break_s must not be negative")
        if not 0 <= self.explore <= 1:
            raise ValueError(f"explore must be in [0, 1], got {self.explore}")

    def decide(self, view: View) -> Decision:
        able = view.candidates()
        if not able:
            return Decision(None, "no replica can take it")
        stay = filtered(view, (self._affine,), able) if self.keep_match is not None else able
        scorers = (
            (prefix_score, self.prefix),
            (load_score, self.load),
            (queue_score, self.queue),
            (kv_score, self.kv),
        )
        totals = scored(view, scorers, stay)
        chosen = self._turns.most(view.names(stay), totals)
        return Decision(chosen, f"score {max(totals):.3f} among {len(stay)} of {len(able)}")

    def _affine(self, view: View, reports: list[Report]) -> list[Report]:
        assert self.keep_match is not None
        enough = self.keep_match * view.request.prompt.num_tokens
        pairs = zip(reports, view.hits(reports), strict=True)
        kept = [report for report, hit in pairs if hit >= enough]
        if not kept or (self.explore and view.rng.random() < self.explore):
            return reports
        if view.cost is not None and len(kept) < len(reports):
            among, of_all = (min(_ttfts_s(view, part)) for part in (kept, reports))
            if among - of_all > self.break_s:
                return reports
        return kept


def prefix_score(view: View, reports: list[Report]) -> list[float]:
    if not view.matched():
        return [0.0] * len(reports)
    num = len(view.request.prompt.blocks(reports[0].block_size))
    return [held / num for held in view.held(reports)]


def load_score(view: View, reports: list[Report]) -> list[float]:
    return view.loads(short_queue, reports)


def short_queue(report: Report, sent: Sent) -> float:
    return 0.5 * (1 - min(num_waiting(report, sent), LONG_QUEUE) / LONG_QUEUE)


def queue_score(view: View, reports: list[Report]) -> list[float]:
    return spread([-float(waiting) for waiting in view.loads(num_waiting, reports)])


def kv_score(view: View, reports: list[Report]) -> list[float]:
    return [1.0 - ratio for ratio in view.loads(told_kv_ratio, reports)]


def _ttfts_s(view: View, reports: list[Report]) -> list[float]:
    return list(map(add, view.queues_s(reports), view.prefills_s(view.hits(reports))))
