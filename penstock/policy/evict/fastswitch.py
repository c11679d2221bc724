"""Preempt the job of lowest drawn priority, and keep its blocks in host memory.

Source: FastSwitch (a context-switching layer on vLLM 0.3.3), as described by readers; no code was published that we
found.

Idea: when priorities change often, what is preempted comes back soon. So its keys and values are copied to host memory
and back instead of being computed again; that this is cheap is the mechanism's work (penstock.engine.swap: runs of
blocks, copies that stay valid, copies beside the steps). The victim is the one with the lowest priority now. The asker
competes like all others: when its turn comes it gives up, alone.

Parameters
    every_steps   steps between two draws of priorities, default 25
    pattern       "random" (default) or "markov"; see penstock.policy.drawn
    stay          default 0.8
    seed          of the numbers, default 0; give order drawn-priority the same four

Where we differ: a replica without host memory computes its victims again. Asked about cached blocks (no asker) it takes
them as offered, the longest unused first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

from penstock.core.events import Event
from penstock.core.views import Eviction, JobView
from penstock.policy.drawn import Drawn, Pattern
from penstock.policy.evict import Decision, View, take, take_or_give_up


@dataclass(slots=True)
class FastSwitch:
    every_steps: int = 25
    pattern: Pattern = "random"
    stay: float = 0.8
    seed: int = 0
    _drawn: Drawn = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._drawn = Drawn(self.every_steps, self.pattern, self.stay, self.seed)

    def observe(self, event: Event) -> None:
        self._drawn.observe(event)

    def decide(self, view: View) -> Decision:
        if view.asker is None:
            return take(view, view.items)
        jobs = list(cast(Iterable[JobView], view.items))
        chosen = take_or_give_up(view, self._drawn.ranked(jobs, reverse=True))
        return Decision(tuple([Eviction(item, "host") for item, _ in chosen.evictions]), chosen.why)
