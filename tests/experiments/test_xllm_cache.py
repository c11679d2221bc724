"""The experiment on xLLM's cache: its verdict on tables whose truth is known, and small runs of both parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.experiments import xllm_cache
from penstock.lab.experiment import Row, Scale, check_plan
from penstock.lab.offline_pulls import MOVES
from penstock.lab.tier_play import PLACES, RATES


def rows(tokens: float, sooner: float, pulled: float, kept: float) -> list[Row]:
    """`tokens`, `sooner`: what tiers and peers gain on documents."""
    found = []
    for seed in range(5):
        for traffic in RATES:
            for variant in PLACES:
                gains = (tokens, sooner) if variant == "tiers and peers" else (1.0, 1.0)
                figures = {
                    "computed_tokens": 1e6 / gains[0],
                    "ttft_s": 2.0 / gains[1],
                    "found_share": 0.5,
                    "peer_gb": 3.0,
                }
                settings = {"part": "tiers", "traffic": traffic, "variant": variant, "seed": seed}
                found.append(Row(settings=settings, figures=figures))
        for variant in MOVES:
            told = {"offline_tokens_per_s": 1000.0 * (pulled if variant == "pulled" else 1.0)}
            settings = {"part": "pulls", "variant": variant, "seed": seed}
            found.append(Row(settings=settings, figures={**told, "attainment": kept}))
    return found


@pytest.mark.parametrize(
    ("truth", "outcome"),
    [
        ((1.5, 1.3, 1.2, 1.0), "reproduced"),
        ((1.2, 1.3, 1.2, 1.0), "in part"),
        ((1.5, 1.3, 1.2, 0.9), "in part"),
        ((1.0, 1.0, 1.0, 0.9), "not"),
    ],
)
def test_verdict(truth: tuple[float, float, float, float], outcome: str) -> None:
    verdict = xllm_cache.judge(rows(*truth))
    assert verdict.outcome == outcome
    ratios = {ratio.name: ratio.mean for ratio in verdict.ratios}
    name = "documents: prompt tokens computed, device / tiers and peers"
    assert ratios[name] == pytest.approx(truth[0])
    assert ratios["offline tokens/s: pulled / stays"] == pytest.approx(truth[2])


def test_plans_hold_the_rules(tmp_path: Path) -> None:
    for scale in (Scale(), Scale(name="full", num_seeds=5, data=tmp_path)):
        check_plan(xllm_cache.EXPERIMENT, list(xllm_cache.plan(scale, {})), scale)


def test_what_lies_elsewhere_spares_prompts() -> None:
    common: dict[str, object] = {"part": "tiers", "traffic": "documents", "num": 80, "seed": 0}
    found = {
        variant: xllm_cache.work({**common, "variant": variant}, Scale())
        for variant in ("device", "peers", "tiers and peers")
    }
    tokens = {variant: float(str(each["computed_tokens"])) for variant, each in found.items()}
    assert tokens["device"] > tokens["peers"] >= tokens["tiers and peers"] > 0
    assert int(str(found["peers"]["fetches"])) > 5 and found["device"]["fetches"] == 0


def test_offline_work_that_is_pulled_is_more() -> None:
    common: dict[str, object] = {"part": "pulls", "num": 12, "seed": 0}
    pulled, stays = (
        xllm_cache.work({**common, "variant": variant}, Scale()) for variant in ("pulled", "stays")
    )
    assert float(str(pulled["offline_tokens_per_s"])) > float(str(stays["offline_tokens_per_s"]))
    assert pulled["attainment"] == 1.0
