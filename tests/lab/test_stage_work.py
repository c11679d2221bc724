"""The work that roles divide: what any of them can serve at most, against fixed numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cost.step import StepFeatures
from penstock.lab.stage_work import StageWork, stage_work


class Line:
    """A step takes 10 ms, 0.1 ms a prompt token, and 1 ms for each answer."""

    def seconds(self, features: StepFeatures) -> float:
        prompts = features.num_tokens if features.num_prefills else 0
        return 0.01 + 1e-4 * prompts + 1e-3 * features.num_decodes


def test_prompts_have_steps_of_their_own_and_answers_share_theirs() -> None:
    work = stage_work([(100, 30), (300, 10)], Line(), tpot_s=0.0501)  # type: ignore[arg-type]
    assert work.prompt_s == pytest.approx(0.01 + 1e-4 * 200)
    together = stage_work([(100, 30), (300, 10)], Line(), tpot_s=0.0501, step_tokens=400)  # type: ignore[arg-type]
    assert together.prompt_s == pytest.approx((0.01 + 1e-4 * 400) / 2)
    assert work.answer_s == pytest.approx(20 * 0.05 / 40)  # 40 answers take a step of 50 ms


@settings(max_examples=100)
@given(st.floats(0.01, 10), st.floats(0.01, 10), st.integers(1, 8), st.integers(1, 8))
def test_no_fixed_roles_serve_more_than_all_replicas_at_work(
    prompt_s: float, answer_s: float, prefilling: int, writing: int
) -> None:
    assert StageWork(prompt_s, answer_s).most_over(prefilling, writing) >= 1 - 1e-9


def test_roles_in_proportion_to_the_work_leave_nothing_to_win() -> None:
    work = StageWork(5.0, 1.0)
    assert work.most_over(5, 1) == pytest.approx(1.0)
    assert work.most_over(6, 2) == pytest.approx(8 / 6 * 5 / 6)
    assert work.most_over(4, 4) == pytest.approx(5 / 3)
