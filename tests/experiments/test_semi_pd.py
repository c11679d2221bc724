"""semi-PD's experiment: its verdict on tables whose truth is known, and one run of it."""

from __future__ import annotations

import pytest

from penstock.experiments import semi_pd
from penstock.lab.experiment import Row, Scale, check_plan


def rows(tight: float, published: float, moved: float) -> list[Row]:
    """Lanes serve `tight` times prefill-first at the tightest gap, `published` times at the published promises; after
    the shift the controller serves `moved` times the split that was best before."""
    found = []
    for seed in range(5):
        for name in semi_pd.BLIND | semi_pd.SEEING:
            for promise in semi_pd.PROMISES:
                rate = 10.0 + 0.1 * seed
                if name in semi_pd.ELASTIC:
                    rate *= {"2.0/0.025": tight, "0.3/0.15": published}.get(promise, 1.0)
                    rate *= 1.01 if name == "elastic-50" else 1.0
                if name in semi_pd.CHUNKED:
                    rate *= 1.1
                chat = {"variant": name, "workload": "chat", "seed": seed}
                found.append(Row(settings=chat, figures={f"rate {promise}": rate}))
                if name in semi_pd.ELASTIC | semi_pd.OVERLAPPED | semi_pd.DYNAMIC:
                    later = 3.0 * (moved if name == "dynamic" else 1.0)
                    shift = {"variant": name, "workload": "shift", "seed": seed}
                    found.append(Row(settings=shift, figures={f"rate {promise}": later}))
    return found


@pytest.mark.parametrize(
    ("tight", "published", "moved", "outcome"),
    [
        (1.5, 1.6, 1.2, "reproduced"),
        (1.5, 0.7, 1.2, "in part"),
        (1.5, 1.6, 0.8, "in part"),
        (1.0, 0.7, 0.8, "not"),
    ],
)
def test_verdict(tight: float, published: float, moved: float, outcome: str) -> None:
    verdict = semi_pd.judge(rows(tight, published, moved))
    assert verdict.outcome == outcome
    ratios = {ratio.name: ratio.mean for ratio in verdict.ratios}
    assert ratios["2.0/0.025: elastic-50 / prefill-first"] == pytest.approx(1.01 * tight)
    assert ratios["0.3/0.15: elastic-50 / vllm-512"] == pytest.approx(1.01 * published / 1.1)
    assert ratios["1.0/0.03, after the shift: dynamic / elastic-50, best before"] == pytest.approx(
        moved
    )


def test_memory_of_two_cards_by_hand() -> None:
    """80 GiB less 1.5 GB; weights of 16.06 GB once or twice; 131,072 bytes a token."""
    both, idle = semi_pd.memory()
    assert both.mean == pytest.approx(2.25, abs=0.1)
    assert idle.mean == pytest.approx(98, abs=1)


def test_plans_hold_the_rules() -> None:
    for scale in (Scale(), Scale(name="full", num_seeds=5)):
        plan = list(semi_pd.plan(scale, {}))
        check_plan(semi_pd.EXPERIMENT, plan, scale)
    assert {str(each["workload"]) for each in plan} == {"chat", "shift"}


def test_a_run_finds_rates_and_more_cores_for_prompts_find_first_tokens() -> None:
    """At a promise that only first tokens can break, a prefill lane of 70 % serves more than one of 40 %."""
    found = {}
    for name in ("elastic-40", "elastic-70"):
        settings = {
            "variant": name, "workload": "chat", "num": 25, "seed": 0, "promises": ["0.3/0.15"],
        }  # fmt: skip
        figures = semi_pd.work(settings, Scale())
        found[name] = float(str(figures["rate 0.3/0.15"]))
        assert "llama-3.1-8b" in str(figures["cost_model"]) and figures["finished"]
    assert found["elastic-70"] > 1.1 * found["elastic-40"] > 0
