"""Priorities drawn anew every few steps, highest first.

Source: the changing priorities of FastSwitch's evaluation (frequencies 0.02 and 0.04 a step), as described by readers.

Idea: a service that is fair over time gives everybody a turn, so who matters most changes while answers are written.
The numbers stand for such a rule without being one: see penstock.policy.drawn.

Parameters
    every_steps   steps between two draws, default 25
    pattern       "random" (default) or "markov": a job keeps its number with probability `stay`
    stay          default 0.8
    seed          of the numbers, default 0; evict fastswitch takes the same four and sees the same numbers

Where we differ: in "markov" the source has those who were served recently keep a high priority; here anybody keeps what
it has. Request.priority is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from penstock.core.events import Event
from penstock.policy.drawn import Drawn, Pattern
from penstock.policy.order import FEW, Decision, View, in_order


@dataclass(slots=True)
class DrawnPriority:
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
        drawn, waiting = self._drawn, view.waiting
        if len(waiting) <= FEW:
            return Decision(drawn.ranked(waiting), stable_for=drawn.steps_left)
        columns = view.columns()
        numbers = drawn.numbers(columns["seq"])
        ranks = np.lexsort((columns["seq"], columns["arrived_at"], numbers))
        return Decision(in_order(waiting, ranks), stable_for=drawn.steps_left)
