"""Conversations: turns that grow on each other.

`[lengths]` gives what a turn adds: the new message and the answer. The prompt of turn k is the prompt of turn k-1, its
answer, and the new message, so its hash ids extend those of turn k-1. Turn k is asked for a thinking time after the
answer to turn k-1 has ended. A conversation ends after `turns`, or before the turn whose prompt would reach
`max_context` tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from penstock.traffic.draws import Draw, Drawn, draw_of, whole
from penstock.traffic.prefix import Chain
from penstock.traffic.rows import Row, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """Both are distributions, see `traffic.draws`."""

    turns: Drawn
    think_s: Drawn = 30.0
    max_context: int | None = None


class Conversations:
    """Draws the turns of conversations."""

    def __init__(self, sessions: Sessions, where: str) -> None:
        self._turns: Draw = draw_of(sessions.turns, f"{where}.turns")
        self._think_s: Draw = draw_of(sessions.think_s, f"{where}.think_s")
        self._max_context = sessions.max_context

    def steps(
        self, first: Row, opening: Chain, lengths: Iterator[tuple[int, int]], chance: random.Random
    ) -> tuple[Step, ...]:
        """The conversation that begins with `first`, whose prompt begins with `opening`; `first.session` names it."""
        name = first.session
        chain = opening.extend(f"{name}/0", first.num_prompt - opening.num_tokens)
        steps = [Step(first._replace(hash_ids=chain.ids))]
        for turn in range(1, whole(self._turns, chance)):
            asked, answered = next(lengths)
            chain = chain.extend(f"{name}/{turn - 1}+", steps[-1].row.num_output)
            chain = chain.extend(f"{name}/{turn}", asked)
            if self._max_context is not None and chain.num_tokens >= self._max_context:
                break
            row = first._replace(
                num_prompt=chain.num_tokens, num_output=answered, hash_ids=chain.ids
            )
            steps.append(Step(row, (turn - 1,), self._think_s.draw(chance)))
        return tuple(steps)
