"""The verdict on tables whose truth is known, and its pieces by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from penstock.cost.schedulers import load_schedulers
from penstock.cost.step import StepFeatures
from penstock.experiments import find, nanoflow
from penstock.lab.experiment import Row, Scale, check_plan

GOOD = {
    "sequential_per_s": 1000.0,
    "overlapped_per_s": 1200.0,
    "slowed_per_s": 1050.0,
    "optimum_per_s": 2000.0,
    "free_to_products": 1.02,
    "search_s": 40.0,
    "late_share": 0.003,
    "batch_tokens": 2000.0,
    "num_devices": 8.0,
    "decide_s": 0.01,
}


def rows(**changes: float) -> list[Row]:
    figures: Mapping[str, object] = {**GOOD, **changes}
    points = [("512/512", "paper"), ("splitwise", "paper"), ("splitwise", "pessimistic")]
    return [
        Row(
            settings={
                "system": "70b",
                "card": nanoflow.MAIN,
                "workload": workload,
                "variant": variant,
                "seed": seed,
            },
            figures=figures,
        )
        for workload, variant in points
        for seed in range(2)
    ]


def test_verdict_when_all_holds() -> None:
    verdict = nanoflow.judge(rows())
    assert verdict.outcome == "reproduced"
    first, second, third = verdict.ratios[:3]
    assert first.values == (1.2, 1.2) and second.values == (1.05, 1.05)
    assert third.values == pytest.approx((60.0, 60.0)) and third.unit == "%"
    assert "pessimistic" in verdict.ratios[-1].name and "'pessimistic': 1.200" in verdict.why
    # Steps of 2000 tokens take 250 ms and, overlapped, 208.3 ms; a decision 10 ms.
    assert "4.8% to 4.8% of a step" in verdict.why and "leaves 1.191 to 1.191x" in verdict.why


def test_forming_a_batch_is_priced_by_the_stored_times() -> None:
    step = StepFeatures(1000, 900, 900, 900, 900 * 500, 500, 2, 5000)
    found = nanoflow.decide_s([step, step])
    stored = load_schedulers().nearest("fcfs/full-fit/constant-dense/recompute-last")
    assert stored.policies.split("/")[2] == "constant-dense"
    assert found == pytest.approx(stored.fixed_s + 900 * stored.per_running_s)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"overlapped_per_s": 1090.0}, "1.1x or more: no"),
        ({"slowed_per_s": 990.0}, "when cutting loses 13.2 %: no"),
        ({"optimum_per_s": 3000.0}, "50 to 72 % of the optimum: no"),
        ({"search_s": 700.0}, "without interference: no"),
        ({"free_to_products": 1.06}, "without interference: no"),
    ],
)
def test_verdict_names_the_part_that_fails(change: dict[str, float], told: str) -> None:
    verdict = nanoflow.judge(rows(**change))
    assert verdict.outcome == "in part" and told in verdict.why


def test_plans_keep_the_rules() -> None:
    experiment = find("nanoflow")
    check_plan(experiment, experiment.plan(Scale(), {}), Scale())
    full = Scale(name="full", num_seeds=5)
    plan = experiment.plan(full, {})
    check_plan(experiment, plan, full)
    assert {str(point["variant"]) for point in plan} == {"none", "paper", "pessimistic"}
    assert [point["seed"] for point in plan] == sorted(int(str(point["seed"])) for point in plan)


def test_the_optimum_is_products_alone() -> None:
    """Llama-2-70B: 68.7 G weights are multiplied for a token; an A100 does 312 TFLOPS of which 88 % at best."""
    assert nanoflow.optimum_per_s("70b", nanoflow.MAIN) == pytest.approx(
        0.88 * 312e12 / (2 * 68.7e9), rel=2e-3
    )


def test_the_dense_batch_fits_in_memory() -> None:
    scale = Scale()
    for workload in nanoflow.CONSTANT:
        load, most_jobs, blocks = nanoflow.load_of("70b", workload, scale)
        assert load.tokens <= 2048 and load.tokens % 128 == 0
        assert load.decodes <= most_jobs
        assert load.decode_context <= 0.86 * blocks * 16
    assert nanoflow.load_of("70b", "512/512", scale)[0].tokens == 2048
    assert nanoflow.load_of("70b", "512/1024", scale)[0].tokens < 2048
