"""The search for the highest rate, on curves whose crossing is known, and what answers are judged by."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from penstock.core.events import Finished
from penstock.core.types import Slo
from penstock.lab.highest_rate import Kept, Numbered, highest_rate
from penstock.traffic.lengths import Fixed

STEP = 1.06


@pytest.mark.parametrize("true", [0.6, 2.0, 7.77, 19.0])
def test_it_finds_where_a_curve_crosses(true: float) -> None:
    asked: list[int] = []

    def attained(place: int) -> float:
        asked.append(place)
        return 1 / (1 + (STEP**place / true) ** 8 / 9)  # 0.9 at the true rate

    found = highest_rate(attained, low=-13, high=61, step=STEP, wanted=0.9)
    assert found == pytest.approx(true, rel=0.01)
    assert len(asked) == len(set(asked)) <= 2 + math.ceil(math.log2(74))


def test_nothing_will_do_or_everything() -> None:
    assert highest_rate(lambda place: 0.5, low=0, high=9, step=2.0, wanted=0.9) == 0.0
    most = highest_rate(lambda place: 1.0, low=0, high=9, step=2.0, wanted=0.9)
    assert 2.0**8 <= most <= 2.0**9


def test_answers_are_judged_by_both_promises_and_from_a_number_on() -> None:
    kept = Kept(first=10)
    for number, ttft, gap in ((3, 9.0, 9.0), (10, 0.5, 0.02), (11, 0.5, 0.09), (12, 2.0, 0.02)):
        kept.emit(
            Finished(
                at=9.0,
                who="replica-0",
                request=str(number),
                answer=0,
                reason="stop",
                arrived_at=1.0,
                admitted_at=1.0,
                first_token_at=1.0 + ttft,
                last_token_at=1.0 + ttft + 10 * gap,
                num_prompt=5,
                num_cached=0,
                num_output=11,
                num_preemptions=0,
                tenant="t",
                priority=0,
                slo=Slo(),
            )  # fmt: skip
        )
    assert [round(gap, 6) for _, gap in kept.times] == [0.02, 0.09, 0.02]
    assert kept.attainment(1.0, 0.05) == pytest.approx(1 / 3)
    assert kept.attainment(3.0, 0.1) == 1.0


def test_kinds_follow_each_other_at_one_rate() -> None:
    arrivals = Numbered(
        lengths=[Fixed(prompt=5, output=2), Fixed(prompt=9000, output=3)],
        num=500, rate_per_s=4.0, seed=1, slo=Slo(), longest=100,
    )  # fmt: skip
    found = list(arrivals)
    assert [int(request.id) for _, request in found] == list(range(1000))
    assert {request.prompt.num_tokens for _, request in found[:500]} == {5}
    assert {request.prompt.num_tokens for _, request in found[500:]} == {100}
    gaps = [later - earlier for (earlier, _), (later, _) in pairwise(found)]
    assert sum(gaps) / len(gaps) == pytest.approx(0.25, rel=0.1)
