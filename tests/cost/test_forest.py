"""Lengths from a forest: calibrated on answers it has not seen, nearer than one window for all, and consistent."""

from __future__ import annotations

import builtins
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.length_bounds import job_of, loss
from penstock.cluster.predictors import predictors_of
from penstock.cluster.spec import ExecutorSpec
from penstock.core.errors import BadConfig, MissingExtra
from penstock.cost.forest import ForestLengths, Growth
from penstock.cost.lengths import History, RecentLengths
from penstock.cost.shapes import shape_of

SMALL = Growth(trees=20)
CAP = 4000


def rows_of(seed: int, num: int) -> list[tuple[int, int]]:
    """The longer the prompt, the shorter the answer: lognormal around 20,000 / prompt."""
    chance = np.random.default_rng(seed)
    prompts = (50 * 16 ** chance.random(num)).astype(int)
    answers = np.exp(np.log(20_000 / prompts) + 0.5 * chance.standard_normal(num))
    return list(zip(prompts.tolist(), (1 + answers.astype(int)).tolist(), strict=True))


@functools.cache
def grown() -> Any:
    pytest.importorskip("quantile_forest")
    return ForestLengths(rows_of(1, 2500), SMALL)


def test_bounds_hold_and_are_nearer_than_those_of_all_answers_together() -> None:
    forest, recent = grown(), RecentLengths(History())
    for _, answer in rows_of(1, 2500):
        recent.add(answer)
    unseen = rows_of(2, 1500)
    jobs = [(job_of(prompt, CAP), answer) for prompt, answer in unseen]
    ours = [(forest.quantile(job, 0.95), answer) for job, answer in jobs]
    theirs = [(recent.quantile(job, 0.95), answer) for job, answer in jobs]
    assert sum(answer > bound for bound, answer in ours) <= 0.07 * len(ours)
    assert loss(ours, 0.95) < 0.8 * loss(theirs, 0.95)


@pytest.mark.parametrize(("prompt", "done"), [(100, 0), (100, 220), (400, 0), (400, 60)])
def test_quantiles_are_those_of_the_true_distribution(prompt: int, done: int) -> None:
    truth = stats.lognorm(0.5, scale=20_000 / prompt)
    job = job_of(prompt, CAP)
    job.num_output = done
    passed = truth.cdf(done)
    for q in (0.25, 0.5, 0.75, 0.9):
        found = grown().quantile(job, q)
        assert found > done
        assert (truth.cdf(found) - passed) / (1 - passed) == pytest.approx(q, abs=0.1)


def test_samples_follow_the_quantiles_and_both_stay_within_bounds() -> None:
    forest = grown()
    for prompt, done, cap in ((60, 0, CAP), (300, 55, CAP), (300, 10, 40), (790, 3000, CAP)):
        job = job_of(prompt, cap)
        job.num_output = done
        drawn = [forest.sample(job, u / 200) for u in range(200)]
        assert drawn == sorted(drawn) and done < drawn[0] and drawn[-1] <= cap
        for q in (0.1, 0.5, 0.95):
            told = forest.quantile(job, q)
            assert done < told <= cap
            assert q - 0.06 <= sum(length <= told for length in drawn) / 200
    jobs = [job_of(prompt, 200) for prompt, _ in rows_of(3, 50)]
    assert forest.quantiles(jobs, 0.8) == [forest.quantile(job, 0.8) for job in jobs]


def test_the_configuration_chooses_it(tmp_path: Path) -> None:
    pytest.importorskip("quantile_forest")
    rows = enumerate(rows_of(4, 150))
    lines = [f"2026-01-01 00:00:00.{at:03},{prompt},{answer}" for at, (prompt, answer) in rows]
    path = tmp_path / "seen.csv"
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    executor = ExecutorSpec(kind="modelled", gpu="a100-80g")
    shape = shape_of("llama-3.1-8b")
    found = predictors_of(executor, shape, History(trained_on=str(path))).lengths
    assert isinstance(found, ForestLengths)
    assert found.quantile(job_of(60, CAP), 0.9) > found.quantile(job_of(750, CAP), 0.9)
    assert predictors_of(executor, shape, History(trained_on=str(path))).lengths is found
    with pytest.raises(ValueError, match="takes the place"):
        History(trained_on="seen.csv", window=50)


def test_too_little_to_learn_from_and_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadConfig, match="100 requests or more, got 7"):
        ForestLengths(rows_of(1, 7))
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "quantile_forest":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match="quantile-forest"):
        ForestLengths(rows_of(1, 200))
