"""Priorities that change while jobs run, drawn from a seed: how fairness by changing priorities is tried out.

Every `every_steps` steps each job gets a new number in [0, 1); lower goes first. It is a function of the seed, the
job's arrival number and how often was drawn, so that several policies see the same numbers without talking to each
other.

    random   each draw is independent
    markov   a job keeps its number with probability `stay`, else it is drawn anew

Source: the offline priority traces of FastSwitch's evaluation, as described by readers; own code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from penstock.core.events import Completed, Event
from penstock.core.views import JobView

Pattern = Literal["random", "markov"]
WORD = (1 << 64) - 1


@dataclass(slots=True)
class Drawn:
    every_steps: int
    pattern: Pattern
    stay: float
    seed: int
    _steps: int = field(init=False, default=0, repr=False)

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {self.every_steps}")
        if not 0 <= self.stay < 1:
            raise ValueError(f"stay must be in [0, 1), got {self.stay}")

    def observe(self, event: Event) -> None:
        if isinstance(event, Completed):
            self._steps += event.steps_run

    @property
    def steps_left(self) -> int:
        """Steps until the next draw, at least 1."""
        return self.every_steps - self._steps % self.every_steps

    def standing(self, job: JobView) -> tuple[float, float, int]:
        """Who is smaller goes first."""
        return self._number(job.seq), job.arrived_at, job.seq

    def _number(self, seq: int) -> float:
        turn = self._steps // self.every_steps
        if self.pattern == "markov":
            while turn and uniform(self.seed, seq, turn, 1) < self.stay:
                turn -= 1
        return uniform(self.seed, seq, turn, 0)


def uniform(seed: int, seq: int, turn: int, what: int) -> float:
    """A number in [0, 1) that looks like chance; the finaliser of splitmix64."""
    word = seed * 0x9E3779B97F4A7C15 + seq * 0xD1342543DE82EF95 + turn * 0xAF251AF3B0F025B5 + what
    word &= WORD
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        word = (word ^ (word >> shift)) * factor & WORD
    return word / (WORD + 1)
