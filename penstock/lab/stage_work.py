"""What a prompt and an answer take a replica that does nothing else: the work that roles divide.

    prompt    its share of steps of whole prompts, as many as have no more than so many tokens together (one at least)
    answer    its share of steps as large as keep the pace, of answers of the usual context

No way to divide replicas serves more than  replicas / (prompt + answer)  requests a second, and those in fixed roles
serve no more than the smaller of  prefilling / prompt  and  writing / answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from penstock.cost.step import StepModel, features_of
from penstock.lab.encode_budgets import largest

MOST_ANSWERS = 256


class StageWork(NamedTuple):
    """Seconds, in the mean."""

    prompt_s: float
    answer_s: float

    def most_over(self, prefilling: int, writing: int) -> float:
        """How many times what fixed roles can serve any others can, as far as the work goes."""
        fixed = min(prefilling / self.prompt_s, writing / self.answer_s)
        return (prefilling + writing) / sum(self) / fixed


def stage_work(
    pairs: Sequence[tuple[int, int]], model: StepModel, tpot_s: float, *, step_tokens: int = 1
) -> StageWork:
    """`pairs`: tokens of prompts and answers. `step_tokens` 1: each prompt has a step of its own."""
    num = len(pairs)
    context = max(2, round(math.fsum([prompt + output / 2 for prompt, output in pairs]) / num))

    def step_s(answers: int) -> float:
        return model.seconds(features_of([(context - 1, 1, 1)] * answers))

    answers = largest(lambda number: step_s(number) <= tpot_s, 1, MOST_ANSWERS)
    steps: list[list[int]] = [[]]
    for prompt, _ in pairs:
        if steps[-1] and sum(steps[-1]) + prompt > step_tokens:
            steps.append([])
        steps[-1].append(prompt)
    times = [model.seconds(features_of([(0, prompt, 1) for prompt in step])) for step in steps]
    outputs = sum([output for _, output in pairs])
    return StageWork(math.fsum(times) / num, step_s(answers) / answers * outputs / num)
