"""The verdict on xLLM's encode role, on tables whose truth is known, and one small run."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.experiments import find, xllm_encode
from penstock.lab.experiment import Row, Scale, check_plan


def rows(staged: float, hybrid: float, flips: float) -> list[Row]:
    found = []
    for settings in xllm_encode.plan(Scale(name="full", num_seeds=5), {}):
        traffic, variant = str(settings["part"]), str(settings["variant"])
        rate = 10.0 + float(str(settings["seed"]))
        if variant == "staged":
            rate *= staged
        elif variant == "xllm":
            rate *= flips
        elif traffic in xllm_encode.PLACEMENTS and variant != "inline":
            is_best = variant == xllm_encode.PLACEMENTS[traffic][3]
            rate *= staged * (hybrid if is_best else 0.5 * hybrid)
        found.append(Row(settings=settings, figures={"rate": rate}))
    return found


@pytest.mark.parametrize(
    ("truth", "outcome"),
    [
        ((1.3, 1.2, 1.1), "reproduced"),
        ((1.3, 1.1, 1.1), "in part"),
        ((1.0, 1.2, 0.9), "in part"),
        ((1.0, 1.0, 0.9), "not"),
    ],
)
def test_verdict(truth: tuple[float, float, float], outcome: str) -> None:
    verdict = xllm_encode.judge(rows(*truth))
    assert verdict.outcome == outcome
    ratios = {ratio.name: ratio.mean for ratio in verdict.ratios}
    assert ratios["captions, 50 ms a token: rate, staged / inline"] == pytest.approx(truth[0])
    assert ratios["talk, 25 ms a token: rate, hybrid / staged"] == pytest.approx(truth[1])
    assert ratios["captions, 25 ms a token: rate, hybrid / inline"] == pytest.approx(
        truth[0] * truth[1]
    )
    assert "picked E-P-D 3:4:1" in verdict.why


def test_the_placement_is_picked_by_the_other_seeds() -> None:
    told = rows(1.0, 1.0, 1.0)
    where = {"part": "captions", "tpot_ms": 50.0}
    lucky = [
        Row(settings=row.settings, figures={"rate": 1000.0})
        if row.fits({**where, "variant": "EP-D 7:1", "seed": 3})
        else row
        for row in told
    ]
    chosen = xllm_encode.picked(lucky, "captions", **where)
    assert chosen[3] == "E-P-D 3:4:1" and chosen[0] == "EP-D 7:1"


def test_plan_holds_the_rules(tmp_path: Path) -> None:
    experiment = find("xllm-encode")
    for scale in (Scale(), Scale(name="full", num_seeds=5, data=tmp_path)):
        check_plan(experiment, list(experiment.plan(scale, {})), scale)


def test_a_run_finds_a_rate() -> None:
    settings = {"part": "captions", "tpot_ms": 25.0, "variant": "EP-D 7:1", "num": 12, "seed": 0}
    figures = xllm_encode.work(settings, Scale())
    assert float(str(figures["rate"])) > 10 and figures["finished"]
