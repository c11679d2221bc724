"""Llumnix's experiment: lengths of its answers, and a small run of every variant with its verdict."""

from __future__ import annotations

import pytest

from penstock.experiments.llumnix import EXPERIMENT, work
from penstock.lab.experiment import Row, Scale, check_plan
from penstock.lab.power_laws import POWER_LAWS, length_of


@pytest.mark.parametrize("mean", POWER_LAWS)
def test_lengths_have_the_mean_and_the_quantiles_that_are_told(mean: int) -> None:
    lengths = [length_of(mean, (place + 0.5) / 20_000) for place in range(20_000)]
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.03)
    told = [lengths[round(share * 20_000)] for share in (0.5, 0.8, 0.95, 0.99)]
    assert told == pytest.approx(POWER_LAWS[mean][1:], rel=0.02)


def test_a_small_run_and_its_verdict() -> None:
    scale = Scale(num_seeds=1)
    plan = [{**one, "num": 40} for one in EXPERIMENT.plan(scale, {"rate": 8.0, "azure_rate": 20.0})]
    check_plan(EXPERIMENT, plan, scale)
    rows = [Row(settings=one, figures=work(one, scale)) for one in plan]
    by_part = {
        part: [row for row in rows if row.get("part") == part]
        for part in ("load", "azure", "priorities", "scaling")
    }
    assert all(len({row.get("finished") for row in one}) == 1 for one in by_part.values())
    assert all(row.number("num_finished") == 40 for row in rows)
    assert all(row.number("replica_s") > 0 for row in rows)
    assert EXPERIMENT.judge(rows).why
