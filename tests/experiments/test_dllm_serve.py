"""dLLM-Serve's experiment: engines are what their names say, verdicts follow the table, and a small one really runs."""

from __future__ import annotations

import pytest

from penstock.core.errors import BadTrace
from penstock.experiments import find
from penstock.experiments.dllm_serve import CARDS, LENGTH, OURS, VARIANTS, engine_of, judge
from penstock.lab.canvases import drawn_prompts, poisson, serve
from penstock.lab.experiment import Row


def test_variants_differ_in_what_their_names_say() -> None:
    ours, base = engine_of(OURS, "l40s"), engine_of("base-fp64", "l40s")
    assert (ours.memory.rule.retention, base.memory.rule.retention) == (0.5, 1.0)
    assert (ours.memory.logits.row_cap, base.memory.logits.row_cap) == (1024, None)
    assert (ours.is_lockstep, base.is_lockstep) == (False, True)
    assert not engine_of("mixed-fp64", "l40s").is_lockstep
    assert [engine_of(f"base-{w}", "l40s").memory.logits.bytes_each for w in ("fp16", "fp32")] == [
        2,
        6,
    ]
    for name in ("fast-fp64", "dllm-fast"):
        assert engine_of(name, "l40s").memory.rule.phase(0) == "refresh"
    assert ours.memory.rule.phase(0) == "full"


def test_both_engines_write_the_same_answers() -> None:
    asked = list(zip(poisson(40, 0, None), drawn_prompts(40, 0, 330, 0.6), strict=True))
    ours, base = (serve(engine_of(name, "rtx-4090"), asked) for name in (OURS, "base-fp64"))
    assert ours["finished"] == base["finished"]
    assert base["batch"] == base["most_running"] == 2
    assert ours["batch"] == engine_of(OURS, "rtx-4090").memory.batch(LENGTH)
    assert float(str(ours["tokens_per_s"])) > float(str(base["tokens_per_s"]))
    with pytest.raises(BadTrace, match="too few"):
        serve(engine_of(OURS, "rtx-4090"), asked[:5])


def table(batch: float, speed: float) -> list[Row]:
    """Ours against all others."""
    rows = []
    for card in CARDS:
        for variant in VARIANTS:
            for load in (None, 0.8):
                is_ours = variant == OURS
                figures = {
                    "batch": batch if is_ours else 1.0,
                    "tokens_per_s": speed if is_ours else 1.0,
                    "e2e_p99_s": 1.0,
                }
                point = {"variant": variant, "card": card, "load": load, "seed": 0}
                rows.append(Row(settings=point, figures=figures))
    return rows


@pytest.mark.parametrize(
    ("batch", "speed", "outcome"),
    [(3.0, 1.5, "reproduced"), (3.0, 1.4, "in part"), (2.9, 1.4, "not")],
)
def test_the_verdict_is_the_criterions(batch: float, speed: float, outcome: str) -> None:
    found = judge(table(batch, speed))
    assert found.outcome == outcome
    assert f"throughput {speed:.2f}x, {speed:.2f}x, {speed:.2f}x" in found.why
    assert find("dllm-serve").judge is judge
