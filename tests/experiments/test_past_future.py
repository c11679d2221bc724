"""Past-Future's experiment: plans keep the rules, lengths are as published, verdicts on tables whose truth is known."""

from __future__ import annotations

from statistics import fmean

import pytest

from penstock.experiments import past_future
from penstock.experiments.past_future import MOST, POOL_TOKENS, SLOTS, Lot, judge, plan, work
from penstock.lab.experiment import Row, Scale, check_plan

FULL, QUICK = Scale(name="full", num_seeds=5), Scale(num_seeds=2)


@pytest.mark.parametrize("scale", [FULL, QUICK], ids=["full", "quick"])
def test_plans_keep_the_rules(scale: Scale) -> None:
    check_plan(past_future.EXPERIMENT, plan(scale, {}), scale)


@pytest.mark.parametrize("name", MOST)
def test_lengths_are_those_of_the_source(name: str) -> None:
    requests = list(Lot(distribution=name, num=4000, seed=1).requests())
    prompts = [request.prompt.num_tokens for request in requests]
    outputs = [request.true_output or 0 for request in requests]
    known = {"Dist1": (2064, 3072), "Dist2": (4096, 4096), "Dist3": (3072, 2064), "o1": (381, 2160)}
    prompt, output = known[name]
    assert fmean(prompts) == pytest.approx(prompt, rel=0.1)
    assert fmean(outputs) == pytest.approx(output, rel=0.05)
    assert max(outputs) <= MOST[name]
    assert SLOTS[name] == pytest.approx(POOL_TOKENS / (prompt + output / 2), rel=0.03)


def test_lengths_of_an_earlier_run_are_of_other_requests() -> None:
    lot = Lot(distribution="Dist1", num=50, seed=0)
    begin = past_future.learned("past-future", lot)["begin"]
    assert isinstance(begin, list) and len(begin) == past_future.WARM
    assert begin[:50] != [request.true_output for request in lot.requests()]
    assert past_future.learned("past-future-cold", lot) == {}


def rows_of(*, evictions: float, goodput: float, steps: float) -> list[Row]:
    """As if Past-Future had so many times the evictions, the goodput and the steps of everybody else."""
    rows = []
    for settings in plan(FULL, {}):
        is_ours = settings["variant"] == "past-future"
        figures = {
            "steps": 1000 * (steps if is_ours else 1.0),
            "evictions": 50 * (evictions if is_ours else 1.0),
            "goodput_tokens_per_s": 100 * (goodput if is_ours else 1.0),
            "tokens_per_s": 100.0,
            "gaps_in_time": 0.99,
        }
        rows.append(Row(settings=settings, figures=figures))
    return rows


@pytest.mark.parametrize(
    ("evictions", "goodput", "steps", "outcome"),
    [(0.1, 2.5, 1.0, "reproduced"), (0.1, 0.9, 1.0, "in part"), (0.9, 0.9, 1.2, "in part")],
)
def test_verdicts(evictions: float, goodput: float, steps: float, outcome: str) -> None:
    verdict = judge(rows_of(evictions=evictions, goodput=goodput, steps=steps))
    assert verdict.outcome == outcome
    held = f"goodput twice that of aggressive (mixed) at {8 if goodput > 2 else 0} of 8"
    assert held in verdict.why
    assert f"(prompts) at {4 if goodput > 2 else 0} of 4" in verdict.why


def test_a_small_run_of_each_kind() -> None:
    drained = work(
        {"part": "memory", "distribution": "o1", "variant": "past-future", "num": 12, "seed": 0},
        QUICK,
    )
    assert drained["num_finished"] == 12
    for part in ("mixed", "spaced"):
        served = work(
            {"part": part, "distribution": "o1", "load": 0.1, "variant": "past-future", "num": 12, "seed": 0},
            QUICK,
        )  # fmt: skip
        assert served["num_finished"] == 12 and served["first_in_time"] == 1.0
