"""A share of the prompt held, less a share of memory in use, less a share of the longest queue: the highest wins.

Source: xLLM (JD, 2025), "cache_aware_routing" of jd-opensource/xllm-service.

Idea: three shares between 0 and 1 add up to a score without any weight between them.

    score    = held / blocks of the prompt - memory in use / memory - waiting / the most that wait anywhere
    held     = device + host * blocks in host memory + disk * blocks on disk        one behind the other
    chosen   the highest score, each in turn among equals

Parameters
    host, disk   what a block is worth there, of one on the device; defaults 0.75 and 0.25 (Dynamo's credits)

Where we differ: the source counts blocks in all three places in its index and goes by those on the device only; its
first share is an integer division, so 0 or 1. `waiting` is what a replica reported and what was sent there since.

Does not: look at what a prompt takes to compute, or at promises (xllm does).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from penstock.core.types import Report
from penstock.policy.loads import num_waiting, told_kv_ratio
from penstock.policy.route import Decision, View
from penstock.policy.route.pick import Turns, with_behind


@dataclass(slots=True)
class XllmCache:
    needs_blocks: ClassVar[bool] = True
    host: float = 0.75
    disk: float = 0.25
    _turns: Turns = field(init=False, compare=False, repr=False, default_factory=Turns)

    def __post_init__(self) -> None:
        if not 0 <= self.disk <= self.host <= 1:
            raise ValueError(
                f"0 <= disk <= host <= 1 must hold, got disk {self.disk:g} and host {self.host:g}"
            )

    def decide(self, view: View) -> Decision:
        able = view.candidates()
        if not able:
            return Decision(None, "no replica can take it")
        scores = self._scores(view, able)
        chosen = self._turns.most(view.names(able), scores)
        return Decision(chosen, f"score {max(scores):.3f}")

    def _scores(self, view: View, able: list[Report]) -> list[float]:
        num = max(len(view.request.prompt.blocks(able[0].block_size)), 1)
        held = with_behind(view, able, view.held(able), self.host, self.disk)
        queues, used = view.loads(num_waiting, able), view.loads(told_kv_ratio, able)
        longest = max(queues) or 1
        triples = zip(held, used, queues, strict=True)
        return [worth / num - share - queue / longest for worth, share, queue in triples]
