"""xLLM's experiment: its verdict on tables whose truth is known, and small runs of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.experiments import xllm
from penstock.lab.beside import OFFLINE
from penstock.lab.experiment import Row, Scale, check_plan
from penstock.lab.expert_balance import DEVICES, PLANS, Balance


def rows(code: float, conv: float, offline: float, kept: float, held_out: float) -> list[Row]:
    found = []
    for seed in range(5):
        for traffic, splits in xllm.SPLITS.items():
            best = {"code": code, "conv": conv}.get(traffic, 1.0)
            for variant in ("xllm", *splits, "together"):
                rate = 10.0 + seed - (variant != splits[1])
                settings = {"part": "roles", "traffic": traffic, "variant": variant, "seed": seed}
                told = best * (10.0 + seed) if variant == "xllm" else rate
                found.append(Row(settings=settings, figures={"rate": told}))
        for variant in OFFLINE:
            tokens = 100.0 * (offline if variant == "leftover" else 1.0)
            settings = {"part": "offline", "variant": variant, "seed": seed}
            figures = {"offline_tokens_per_s": tokens, "attainment": kept}
            found.append(Row(settings=settings, figures=figures))
        figures = {f"{plan} {devices}": 2.0 for plan in PLANS for devices in DEVICES}
        figures |= {f"held-out {devices}": 2.0 / held_out for devices in DEVICES}
        settings = {"part": "experts", "variant": "eplb", "seed": seed}
        found.append(Row(settings=settings, figures=figures))
    return found


@pytest.mark.parametrize(
    ("truth", "outcome"),
    [
        ((1.4, 1.1, 2.0, 1.0, 1.8), "reproduced"),
        ((1.1, 1.1, 2.0, 1.0, 1.8), "in part"),
        ((1.4, 1.1, 2.0, 0.9, 1.8), "in part"),
        ((0.9, 0.8, 1.0, 0.9, 1.1), "not"),
    ],
)
def test_verdict(truth: tuple[float, float, float, float, float], outcome: str) -> None:
    verdict = xllm.judge(rows(*truth))
    assert verdict.outcome == outcome
    ratios = {ratio.name: ratio.mean for ratio in verdict.ratios}
    assert ratios["code: rate, roles that change / 6:2"] == pytest.approx(truth[0])
    assert ratios["offline tokens/s: leftover / only when idle"] == pytest.approx(truth[2])
    assert ratios["16 devices: peak load, contiguous / held-out"] == pytest.approx(truth[4])


def test_plans_hold_the_rules(tmp_path: Path) -> None:
    for scale in (Scale(), Scale(name="full", num_seeds=5, data=tmp_path)):
        check_plan(xllm.EXPERIMENT, list(xllm.plan(scale, {})), scale)


def test_offline_work_in_what_is_left_over_keeps_promises_and_gets_more() -> None:
    found = {
        variant: xllm.work({"part": "offline", "variant": variant, "num": 6, "seed": 0}, Scale())
        for variant in ("leftover", "only when idle")
    }
    more, less = (float(str(each["offline_tokens_per_s"])) for each in found.values())
    assert more > 1.5 * less > 0
    assert all(float(str(each["attainment"])) == 1.0 for each in found.values())


def test_published_routing_is_as_even_as_noted(penstock_data: Path) -> None:
    """Noted over all 26 layers; five of them are here, so the last digits differ."""
    figures = Balance(Scale(data=penstock_data), 0).figures()
    noted = {
        4: (1.236, 1.005, 1.002, 1.028, 1.231),
        8: (1.481, 1.021, 1.008, 1.054, 1.452),
        16: (1.921, 1.251, 1.025, 1.089, 1.840),
    }
    for devices, told in noted.items():
        ours = [float(str(figures[f"{plan} {devices}"])) for plan in PLANS]
        assert ours == pytest.approx(told, rel=0.06)
