"""The runner's rules, on a small experiment that really runs, and the verdicts on tables whose truth is known."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from penstock.core.errors import BadConfig, BadTrace, StepFailed
from penstock.experiments import TABLE, burstgpt, find, sglang_ratio, vllm_chunk
from penstock.lab.experiment import (
    SEEDS,
    Experiment,
    Outcome,
    Ratio,
    Row,
    Scale,
    Settings,
    Verdict,
    check_plan,
    paired,
    unequal_sets,
)
from penstock.lab.reproduce import (
    README,
    RESULTS,
    SYSTEMS,
    Kept,
    page_of,
    read_kept,
    readme_page,
    reproduce,
    systems_page,
    verdicts_of,
)
from penstock.lab.trial import SCHEDULERS, Offered, deployment, saturation, trial
from penstock.traffic.arrivals import Gamma, Poisson

SAMPLE = Path(__file__).parents[2] / "data" / "azure_2023_conv_200.csv"


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    return [{"variant": name, "seed": seed} for name in SCHEDULERS for seed in scale.seeds]


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    seed = settings["seed"]
    assert isinstance(seed, int)
    traffic = Offered(
        trace=SAMPLE, num=20, seed=seed, rate_per_s=4.0, process=Poisson(rate_per_s=4.0)
    )
    return trial(deployment(SCHEDULERS[str(settings["variant"])]), traffic)


def judge(rows: Sequence[Row]) -> Verdict:
    values = paired(rows, "ttft_mean_s", {"variant": "vllm-512"}, {"variant": "vllm-2048"})
    return Verdict(outcome="in part", why="it ran", ratios=(Ratio(name="TTFT", values=values),))


SMALL = Experiment(
    name="small",
    system="Small",
    source="none",
    claim="It runs.",
    criterion="It ran.",
    workload="20 requests",
    plan=plan,
    work=work,
    judge=judge,
)


def test_it_runs_goes_on_and_is_read_again(tmp_path: Path) -> None:
    store = tmp_path / "small.points.jsonl"
    kept = reproduce(SMALL, Scale(num_seeds=2), store=store, processes=1)
    assert kept.num_runs == 8 and kept.num_unequal == 0
    assert len(kept.verdict.ratios[0].values) == 2

    worked: list[bool] = []
    again = reproduce(
        SMALL,
        Scale(num_seeds=2),
        store=store,
        processes=1,
        on_progress=lambda done, total, result: worked.append(not result.is_kept),
    )
    assert not any(worked) and len(worked) == 8
    assert again == kept

    path = tmp_path / "small.json"
    path.write_text(kept.to_json())
    assert read_kept(path) == kept
    page = page_of([kept])
    assert "| [Small](#small) |" in page and "in part" in page


def test_a_failed_run_is_told_and_the_others_are_kept(tmp_path: Path) -> None:
    broken = dataclasses.replace(SMALL, work=fails_at_seed_1)
    store = tmp_path / "points.jsonl"
    with pytest.raises(StepFailed, match="4 of 8 runs failed.*no luck"):
        reproduce(broken, Scale(num_seeds=2), store=store, processes=1)
    records = [json.loads(line) for line in store.read_text().splitlines()[1:]]
    assert sum(record["error"] is None for record in records) == 4


def fails_at_seed_1(settings: Settings, scale: Scale) -> Mapping[str, object]:
    if settings["seed"] == 1:
        raise ValueError("no luck")
    return work(settings, scale)


def test_the_rules_are_enforced() -> None:
    with pytest.raises(BadConfig, match="at least 5 seeds"):
        reproduce(SMALL, Scale(name="full", num_seeds=SEEDS - 1))
    full = Scale(name="full", num_seeds=SEEDS)
    some = list(plan(full, {}))
    check_plan(SMALL, some, full)
    with pytest.raises(AssertionError, match="baselines.*s-edf"):
        check_plan(SMALL, [each for each in some if each["variant"] != "s-edf"], full)
    with pytest.raises(AssertionError, match="fewer than 5 seeds"):
        check_plan(SMALL, some[1:], full)
    with pytest.raises(AssertionError, match="twice"):
        check_plan(SMALL, [*some, some[0]], full)


def test_different_sets_of_requests_are_found() -> None:
    rows = [
        Row(settings={"variant": variant, "seed": seed}, figures={"finished": finished})
        for variant, seed, finished in (("a", 0, "x"), ("b", 0, "x"), ("a", 1, "y"), ("b", 1, "z"))
    ]
    assert unequal_sets(rows) == ['{"seed": 1}']


def test_offered_workloads_differ_in_their_arrivals_alone() -> None:
    real = Offered(trace=SAMPLE, num=60, seed=2, rate_per_s=5.0)
    bursty = dataclasses.replace(real, process=Gamma(rate_per_s=1.0, cv=4.0))
    first, second = list(real), list(bursty)
    assert [request for _, request in first] == [request for _, request in second]
    for played in (first, second):
        assert played[0][0] == 0 and played[-1][0] == pytest.approx(59 / 5.0)
    assert [at for at, _ in first] != [at for at, _ in second]
    other = list(dataclasses.replace(real, seed=3))
    assert {request.id for _, request in other} != {request.id for _, request in first}


def test_no_more_than_saturation_is_served() -> None:
    config = deployment(SCHEDULERS["vllm-2048"])
    offered = Offered(trace=SAMPLE, num=100, seed=0, rate_per_s=None)
    most = saturation(config, offered)
    figures = trial(config, dataclasses.replace(offered, rate_per_s=3 * most))
    duration = figures["duration_s"]
    assert isinstance(duration, float) and 100 / duration < 1.1 * most


def test_every_experiment_can_be_planned() -> None:
    for name in TABLE:
        experiment = find(name)
        assert experiment.name == name and experiment.claim.endswith(".")
    with pytest.raises(BadConfig, match="did you mean 'burstgpt'"):
        find("burtsgpt")


def chunk_rows(gap: float, first: float) -> list[Row]:
    """As if a budget of 2,048 had `gap` times the gaps of 512, and 512 `first` times its TTFT."""
    figures = {
        "vllm-512": {"itl_p99_s": 0.05, "ttft_mean_s": 0.1 * first, "worst_class": 1.0},
        "vllm-2048": {"itl_p99_s": 0.05 * gap, "ttft_mean_s": 0.1, "worst_class": 1.0},
    }
    return [
        Row(
            settings={"variant": variant, "card": card, "load": load, "seed": seed},
            figures=figures.get(variant, {"worst_class": 1.0}),
        )
        for variant in SCHEDULERS
        for card in vllm_chunk.CARDS
        for load in vllm_chunk.CORE
        for seed in range(5)
    ]


@pytest.mark.parametrize(
    ("gap", "first", "outcome"), [(3.0, 1.5, "reproduced"), (1.0, 1.5, "not"), (3.0, 1.0, "not")]
)
def test_verdict_on_token_budgets(gap: float, first: float, outcome: str) -> None:
    verdict = vllm_chunk.judge(chunk_rows(gap, first))
    assert verdict.outcome == outcome
    assert verdict.ratios[0].mean == pytest.approx(gap)
    assert verdict.ratios[1].mean == pytest.approx(first)


@pytest.mark.parametrize(
    ("evictions", "steps", "outcome"),
    [(10, 1050, "reproduced"), (10, 1200, "in part"), (90, 1200, "not")],
)
def test_verdict_on_the_ratio(evictions: float, steps: int, outcome: str) -> None:
    figures = {
        "sglang": {"evictions": evictions, "steps": steps},
        "full-fit": {"evictions": 100, "steps": 1000},
        "watermark-5%": {"evictions": 30, "steps": 1010},
    }
    rows = [
        Row(settings={"variant": name, "distribution": each, "seed": seed}, figures=found)
        for name, found in figures.items()
        for each in sglang_ratio.DISTRIBUTIONS
        for seed in range(5)
    ]
    assert sglang_ratio.judge(rows).outcome == outcome


def burst_rows(worse: float, lead: float) -> list[Row]:
    """Real P99 TTFT is `worse` times Poisson's; S-EDF leads by 1 % under Poisson and by `lead` under real arrivals."""
    rows = []
    for workload in burstgpt.WORKLOADS:
        for arrivals in burstgpt.ARRIVALS:
            for load in burstgpt.LOADS:
                for variant in SCHEDULERS:
                    ahead = 0.01 if arrivals == "poisson" else lead
                    figures = {
                        "ttft_p99_s": worse if arrivals == "real" else 1.0,
                        "attainment": 0.9 + (ahead if variant == "s-edf" else 0.0),
                        "dispersion_20_gaps": 1.0,
                    }
                    settings = {
                        "variant": variant,
                        "workload": workload,
                        "arrivals": arrivals,
                        "load": load,
                    }
                    rows += [
                        Row(settings={**settings, "seed": seed}, figures=figures) for seed in (0, 1)
                    ]
    return rows


@pytest.mark.parametrize(
    ("worse", "lead", "outcome"),
    [(3.0, -0.02, "reproduced"), (3.0, 0.02, "in part"), (1.0, -0.004, "not")],
)
def test_verdict_on_bursts(worse: float, lead: float, outcome: str) -> None:
    verdict = burstgpt.judge(burst_rows(worse, lead))
    assert verdict.outcome == outcome
    assert ("leads" in verdict.why) == (lead == -0.02)


def test_a_ratio_over_nothing_is_told_and_not_thrown() -> None:
    rows = [
        Row(settings={"variant": name, "seed": 0}, figures={"evictions": 0}) for name in ("a", "b")
    ]
    values = paired(rows, "evictions", {"variant": "a"}, {"variant": "b"})
    assert values == () and str(Ratio(name="evictions", values=values)) == "not measured"


def test_saturation_needs_answers_enough() -> None:
    few = Offered(trace=SAMPLE, num=1, seed=0, rate_per_s=None)
    with pytest.raises(BadTrace, match="too few"):
        saturation(deployment(SCHEDULERS["sglang"]), few)


def test_no_seeds_are_refused() -> None:
    with pytest.raises(BadConfig, match="at least 1"):
        reproduce(find("vllm-chunk"), Scale(num_seeds=0))


def test_the_page_of_systems_is_current() -> None:
    if not list(RESULTS.glob("*.json")):
        pytest.skip("no results are kept yet")
    assert SYSTEMS.read_text() == systems_page(), (
        "write it again: penstock reproduce NAME --full --keep"
    )
    assert README.read_text() == readme_page(README.read_text()), (
        "write it again: penstock reproduce NAME --full --keep"
    )


def test_verdicts_are_told_in_a_row_each() -> None:
    kept = read_kept(next(RESULTS.glob("*.json")))

    def told(name: str, system: str, outcome: Outcome) -> Kept:
        verdict = dataclasses.replace(kept.verdict, outcome=outcome)
        return dataclasses.replace(kept, name=name, system=system, verdict=verdict)

    lines = verdicts_of(
        [
            told("a", "A: one", "not"),
            told("b1", "B: one", "reproduced"),
            told("b2", "B: two", "not"),
        ]
    )
    assert lines[2:] == [
        "| reproduced | [B: one](docs/systems.md#b1) |",
        "| not | [A](docs/systems.md#a); [B: two](docs/systems.md#b2) |",
    ]
