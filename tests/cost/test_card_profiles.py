"""The profiles of a card in data/profiles beside decode steps of other runs on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cost.fitted import TERMS
from penstock.cost.profile import load_profile
from penstock.cost.step import features_of

FOLDER = Path(__file__).parents[2] / "data" / "profiles"
MEASURED = {  # microseconds by jobs, benchmarks/cuda_roofline.py: context 512, the ninth token behind it
    "8b": ({1: 4570, 8: 5671, 32: 6138, 128: 9103}, 0.05),
    "0.6b": ({1: 1086, 8: 1737, 32: 2480, 128: 4273}, 0.15),
}


@pytest.mark.parametrize("model", MEASURED)
def test_decode_steps_are_foretold(model: str) -> None:
    steps, tolerance = MEASURED[model]
    profile = load_profile(FOLDER / f"h200-qwen3-{model}-bf16.json")
    assert profile.machine["device"].startswith("NVIDIA H200")
    for jobs, micros in steps.items():
        features = features_of([(521, 1, True)] * jobs)
        foretold = sum(each * TERMS[name](features) for name, each in profile.step_terms.items())
        assert foretold == pytest.approx(micros / 1e6, rel=tolerance), jobs
