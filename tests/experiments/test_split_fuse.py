"""SplitFuse's experiment: a closed loop, the authors' rule of being in time, and verdicts on known tables."""

from __future__ import annotations

import random

import numpy as np
import pytest

from penstock.core.events import Arrived, Event, Finished
from penstock.experiments.split_fuse import (
    CLIENTS,
    CROWDED,
    EXPERIMENT,
    MAIN,
    MIXES,
    NUM,
    RATES,
    SPAN,
    VARIANTS,
    Clients,
    Effective,
    Pace,
    judge,
    plan,
    work,
)
from penstock.lab.experiment import Row, Scale, check_plan
from penstock.lab.simulate import simulate
from penstock.lab.trial import deployment


def test_average_gap_is_the_exponential_one_of_pandas() -> None:
    """ewm(span, adjust=True).mean(): weights (1 - a)^age over their sum, a = 2 / (span + 1)."""
    rng = random.Random(3)
    gaps = np.array([rng.expovariate(10.0) for _ in range(50)])
    decay = 1 - 2 / (SPAN + 1)
    expected = []
    for end in range(1, len(gaps) + 1):
        weights = decay ** np.arange(end)[::-1]
        expected.append(float((weights * gaps[:end]).sum() / weights.sum()))
    pace = Pace(0.0, 512)
    for at in [0.9, *(0.9 + np.cumsum(gaps)).tolist()]:
        pace.hear(at)
    assert pace.slowest_s == pytest.approx(max(expected))
    assert pace.is_prompt and not late(1.1).is_prompt


def late(at: float) -> Pace:
    pace = Pace(0.0, 512)
    pace.hear(at)
    return pace


class Load:
    """How many requests are under way at once."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def emit(self, event: Event) -> None:
        if isinstance(event, Arrived) and event.who.startswith("default-"):
            self.now += 1
            self.most = max(self.most, self.now)
        elif isinstance(event, Finished):
            self.now -= 1


def test_each_client_waits_for_its_answer() -> None:
    config = deployment(VARIANTS["split-fuse"], model="llama-2-70b", executor__tensor_parallel=4)
    clients, load, effective = (
        Clients(mix="1200/60", clients=5, num=23, seed=1),
        Load(),
        Effective(),
    )
    found = simulate(config, clients, listeners=(load, effective))
    assert found.figures.all.num_finished == 23 and load.most == 5 and load.now == 0
    itl = found.figures.all.itl_s
    assert itl.num == len(effective.gaps_s) and itl.mean == pytest.approx(np.mean(effective.gaps_s))
    slowest = 1 / max(pace.slowest_s for pace in effective.paces.values())
    in_time = effective.rate_per_s(0.01) * found.figures.duration_s
    assert effective.rate_per_s(slowest * 0.99) == effective.rate_per_s(0.01)
    assert in_time == pytest.approx(23)


def test_the_plan_keeps_the_rules() -> None:
    full = Scale(name="full", num_seeds=5)
    runs = list(plan(full, {}))
    check_plan(EXPERIMENT, runs, full)
    calm = len(CLIENTS) - len(CROWDED)
    assert len(runs) == 5 * len(MIXES) * (calm * len(MAIN) + len(CROWDED) * len(VARIANTS))
    assert {run["num"] for run in runs} == {NUM}


def test_one_run_gives_the_figures_that_are_judged() -> None:
    settings = {"variant": "prefill-first", "mix": "2600/60", "clients": 4, "num": 12, "seed": 0}
    figures = work(settings, Scale())
    for name in ("gap_p95_s", "gap_p99_s", "effective_4_per_s", "rate_per_s", "ttft_mean_s"):
        assert isinstance(figures[name], float)


def rows(gap: float, served: float, apart: float = 0.0) -> list[Row]:
    """As if prefill-first had `gap` times the gaps, and split-fuse served `served` times as many in time."""
    figures = {
        name: {
            "gap_p95_s": gap if name == "prefill-first" else 1.0,
            "gap_p99_s": gap if name == "prefill-first" else 1.0,
            "rate_per_s": 2.0 * (1 + apart * (name == "vllm-768")),
            "ttft_mean_s": 1.0,
            **{
                f"effective_{rate}_per_s": 1.0 if name == "prefill-first" else served
                for rate in RATES
            },
        }
        for name in VARIANTS
    }
    return [
        Row(settings={"variant": name, "mix": mix, "clients": clients, "seed": seed}, figures=found)
        for name, found in figures.items()
        for mix in MIXES
        for clients in CLIENTS
        for seed in range(2)
    ]


@pytest.mark.parametrize(
    ("gap", "served", "outcome"),
    [(4.0, 1.5, "reproduced"), (2.7, 1.5, "in part"), (4.0, 1.1, "in part"), (1.0, 1.0, "not")],
)
def test_verdicts(gap: float, served: float, outcome: str) -> None:
    verdict = judge(rows(gap, served))
    assert verdict.outcome == outcome
    assert verdict.ratios[0].mean == pytest.approx(gap)
    assert verdict.ratios[2].mean == pytest.approx(served)
    assert "at 20 of 20 points" in verdict.why


def test_where_vllm_differs_is_told() -> None:
    assert "at 0 of 20 points, at most 3.0% apart" in judge(rows(4.0, 1.5, apart=0.03)).why
