"""Llumnix's experiment: lengths of its answers, and a small run of every variant with its verdict."""

from __future__ import annotations

import pytest

from penstock.core.events import Reported
from penstock.core.types import Report
from penstock.experiments.llumnix import EXPERIMENT, work
from penstock.lab.experiment import Row, Scale, check_plan
from penstock.lab.llumnix_fleet import Books
from penstock.lab.power_laws import POWER_LAWS, length_of


@pytest.mark.parametrize("mean", POWER_LAWS)
def test_lengths_have_the_mean_and_the_quantiles_that_are_told(mean: int) -> None:
    lengths = [length_of(mean, (place + 0.5) / 20_000) for place in range(20_000)]
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.03)
    told = [lengths[round(share * 20_000)] for share in (0.5, 0.8, 0.95, 0.99)]
    assert told == pytest.approx(POWER_LAWS[mean][1:], rel=0.02)


def test_a_preemption_is_avoidable_where_one_memory_would_hold_everybody_who_waits() -> None:
    books = Books()

    def tell(name: str, *, free: int = 0, waiting: int = 0, preempted: int = 0) -> None:
        told = Report(
            replica=name, at=0.0, free_blocks=free, waiting_blocks=waiting, num_preemptions=preempted
        )  # fmt: skip
        books.emit(Reported(at=0.0, who="fleet", report=told))

    for name, free, waiting in (("a", 0, 0), ("b", 30, 0), ("c", 50, 30)):
        tell(name, free=free, waiting=waiting)
    assert books.num_put_out == 0
    tell("a", waiting=50, preempted=1)
    assert (books.num_put_out, books.num_avoidable) == (1, 1)
    tell("a", waiting=51, preempted=3)
    assert (books.num_put_out, books.num_avoidable) == (3, 1)


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
