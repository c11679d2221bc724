"""Llumnix's experiment: lengths of its answers, and a small run of every variant with its verdict."""

from __future__ import annotations

import pytest

from penstock.experiments.llumnix import EXPERIMENT, MAX_OUTPUT, MEAN_OUTPUT, output_of, work
from penstock.lab.experiment import Row, Scale, check_plan


def test_answers_follow_a_power_law_of_the_mean_that_is_told() -> None:
    outputs = [output_of((place + 0.5) / 20_000) for place in range(20_000)]
    assert sum(outputs) / len(outputs) == pytest.approx(MEAN_OUTPUT, rel=0.02)
    assert max(outputs) == MAX_OUTPUT
    longer = [sum(each > bound for each in outputs) for bound in (200, 2000)]
    assert longer[0] / longer[1] == pytest.approx(10**1.1, rel=0.05)


def test_a_small_run_and_its_verdict() -> None:
    scale = Scale(num_seeds=1)
    plan = [{**one, "num": 60} for one in EXPERIMENT.plan(scale, {"rate": 20.0})]
    check_plan(EXPERIMENT, plan, scale)
    rows = [Row(settings=one, figures=work(one, scale)) for one in plan]
    by_part = {
        part: [row for row in rows if row.get("part") == part] for part in ("load", "scaling")
    }
    assert len({row.get("finished") for row in by_part["load"]}) == 1
    assert all(row.number("num_finished") == 60 for row in rows)
    assert all(row.number("replica_s") > 0 for row in rows)
    assert EXPERIMENT.judge(rows).why
