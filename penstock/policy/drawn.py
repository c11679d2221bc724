"""Priorities that change while jobs run, drawn from a seed: how fairness by changing priorities is tried out.

Every `every_steps` steps each job gets a new number in [0, 1); lower goes first. It is a function of the seed, the
job's arrival number and how often was drawn, so that several policies see the same numbers without talking to each
other.

    random   each draw is independent
    markov   a job keeps its number with probability `stay`, else it is drawn anew

Source: the offline priority traces of FastSwitch's evaluation, as described by readers; own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from penstock.core.events import Completed, Event
from penstock.core.views import JobView

Pattern = Literal["random", "markov"]
WORD = (1 << 64) - 1
OF_SEED, OF_JOB, OF_TURN = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95, 0xAF251AF3B0F025B5
MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
FEW = 64  # jobs up to which numbers are drawn one by one
BACK = np.arange(6, dtype=np.uint64)  # draws looked at together


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

    def ranked(self, jobs: Sequence[JobView], *, reverse: bool = False) -> list[JobView]:
        """By standing."""
        if len(jobs) <= FEW:
            return sorted(jobs, key=self.standing, reverse=reverse)
        numbers = self.numbers(np.array([job.seq for job in jobs], dtype=np.float64)).tolist()
        keys = [
            (number, job.arrived_at, job.seq, job)
            for number, job in zip(numbers, jobs, strict=True)
        ]
        return [job for *_, job in sorted(keys, reverse=reverse)]

    def numbers(self, seqs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Those of many jobs at once."""
        words = seqs.astype(np.uint64)
        turns = np.full(len(seqs), self._steps // self.every_steps, dtype=np.uint64)
        going = np.arange(len(seqs) if self.pattern == "markov" else 0)
        while len(going):
            turn = turns[going, None]
            stays = uniforms(self.seed, words[going, None], turn - BACK, 1) < self.stay
            stays &= turn > BACK
            is_kept = stays.all(axis=1)
            turns[going] -= np.where(is_kept, BACK.size, stays.argmin(axis=1)).astype(np.uint64)
            going = going[is_kept]
        return uniforms(self.seed, words, turns, 0)

    def _number(self, seq: int) -> float:
        turn = self._steps // self.every_steps
        if self.pattern == "markov":
            while turn and uniform(self.seed, seq, turn, 1) < self.stay:
                turn -= 1
        return uniform(self.seed, seq, turn, 0)


def uniform(seed: int, seq: int, turn: int, what: int) -> float:
    """A number in [0, 1) that looks like chance; the finaliser of splitmix64."""
    word = (seed * OF_SEED + seq * OF_JOB + turn * OF_TURN + what) & WORD
    for shift, factor in MIXING:
        word = (word ^ (word >> shift)) * factor & WORD
    return word / (WORD + 1)


def uniforms(
    seed: int, seqs: NDArray[np.uint64], turns: NDArray[np.uint64], what: int
) -> NDArray[np.float64]:
    """The same numbers of many jobs: products of unsigned numbers lose the same digits."""
    word = seqs * np.uint64(OF_JOB) + turns * np.uint64(OF_TURN)
    word += np.uint64((seed * OF_SEED + what) & WORD)
    for shift, factor in MIXING:
        word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    return word / (WORD + 1.0)
