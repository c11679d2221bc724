"""Who would be late is refused before any work is done for it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from penstock.core.types import Slo
from penstock.policy import admit
from penstock.policy.admit.in_time import InTime
from tests.laws.model_ledger import ModelLedger
from tests.laws.views import HalfLengths
from tests.policy.world import make_job


@pytest.mark.parametrize(
    ("now", "promise", "answer"), [(0.0, 1.0, "yes"), (0.75, 1.0, "no"), (9.0, None, "yes")]
)
def test_prompts_that_would_be_late_are_refused(
    now: float, promise: float | None, answer: str
) -> None:
    """20 tokens at 10 ms, 1 ms for each square of ten, and 0.1 s beside them: 0.304 s."""
    job = make_job(0, 20, max_tokens=2)
    job.request = replace(job.request, slo=Slo(ttft_s=promise))
    job.arrived_at = 0.0
    policy = InTime(token_s=0.01, square_s=1e-5, fixed_s=0.1)
    view = admit.View(now, random.Random(0), job, 20, ModelLedger(30, 4).fork(), (), HalfLengths())
    decision = policy.decide(view)
    admit.law(view, decision)
    assert decision.answer == answer


def test_a_job_that_has_its_first_token_stays() -> None:
    job = make_job(0, 8, output=2, max_tokens=6)
    job.request = replace(job.request, slo=Slo(ttft_s=0.1))
    view = admit.View(50.0, random.Random(0), job, 8, ModelLedger(30, 4).fork(), (), HalfLengths())
    assert InTime().decide(view).answer == "yes"
