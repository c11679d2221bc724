"""The earliest first token, by prediction: queue, transfer of a better prefix, prefill of the rest.

Source: Mooncake (Qin et al., FAST 2025), Algorithm 1 and section on overload; its conductor.

Idea: affinity and balance are both seconds until the first token; predict these and take the least.

    hit(i)     prompt tokens that i holds;  best = the most that anybody holds
    ttft(i)    = queue_s(i) + prefill(prompt - hit(i) | hit(i))                             if best <= balance * hit(i)
               = queue_s(i) + transfer(best - hit(i)) + prefill(prompt - best | best)       else
    chosen     the least ttft, each in turn among equals
    refuse     when the least ttft exceeds `refuse_above` times the promise, if that is set (early rejection: the caller
               hears at once what would come too late anyway)

Parameters
    replicates     fetch a better prefix from its holder (the second line); default false: it is for fleets whose
                   replicas fetch (`cache.peers`), and `transfer_s` says what a token takes there
    balance        default 2: so much longer the best prefix must be to be fetched
    refuse_above   default None: nobody is refused        slo_s   default 5, where a request promises nothing

With the defaults it is the "min TTFT" that others compare themselves with. Where we differ: decode instances are the
fleet's second stage. Their rejection by the load predicted for the end of the prefill is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add
from typing import ClassVar

from penstock.policy.route import Decision, View
from penstock.policy.route.pick import Turns


@dataclass(slots=True)
class Mooncake:
    needs_blocks: ClassVar[bool] = True
    needs_cost: ClassVar[bool] = True
    replicates: bool = False
    balance: float = 2.0
    transfer_s: float = 1e-5
    refuse_above: float | None = None
    slo_s: float = 5.0
    _turns: Turns = field(init=False, compare=False, repr=False, default_factory=Turns)

    def __post_init__(self) -> None:
        if self.balance < 1 or self.transfer_s < 0:
            raise ValueError("balance must be at least 1 and transfer_s not negative")
        if not self.slo_s > 0 or (self.refuse_above is not None and not self.refuse_above > 0):
            raise ValueError("slo_s and refuse_above must be positive")

    def decide(self, view: View) -> Decision:
        able = view.candidates()
        if not able:
            return Decision(None, "no replica can take it")
        hits = view.hits(able)
        queues_s = view.queues_s(able)
        if self.replicates:
            hits, queues_s = self._fetched(hits, queues_s)
        times = list(map(add, queues_s, view.prefills_s(hits)))
        least = min(times)
        promise_s = view.request.slo.ttft_s or self.slo_s
        if self.refuse_above is not None and least > self.refuse_above * promise_s:
            return Decision(None, f"{least:.2f} s at best, {promise_s:g} s promised")
        chosen = self._turns.least(view.names(able), times)
        return Decision(chosen, f"first token in {least:.2f} s")

    def _fetched(
        self, hits: Sequence[int], queues_s: Sequence[float]
    ) -> tuple[list[int], list[float]]:
        """Both with the best prefix fetched where it is worth it."""
        best = max(hits)
        fetches = [best > self.balance * hit for hit in hits]
        waits = [
            queue_s + self.transfer_s * (best - hit) * fetch
            for queue_s, hit, fetch in zip(queues_s, hits, fetches, strict=True)
        ]
        return [best if fetch else hit for hit, fetch in zip(hits, fetches, strict=True)], waits
