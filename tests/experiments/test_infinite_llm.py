"""Infinite-LLM: what is drawn, bytes that cross, the longest context, and how rows are judged."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from penstock.assemble import replica_specs
from penstock.assemble.leaves import modelled_outside
from penstock.experiments.infinite_llm import (
    EXPERIMENT,
    KINDS,
    RUN,
    SAMPLE,
    TRACE,
    Mixed,
    One,
    fleet,
    highest,
    judge,
    plan,
)
from penstock.lab.experiment import Row, Scale, check_plan
from penstock.lab.simulate import simulate
from penstock.lab.trial import Finishes
from penstock.report.log import Memory
from penstock.sim.channel import Link
from penstock.sim.lending import LendingExecutor
from penstock.sim.transport import Fabric


def leaf() -> tuple[LendingExecutor, int]:
    """A modelled replica of the experiment, and its blocks."""
    spec = replica_specs(fleet("lending"), 0)[0]
    outside = modelled_outside(spec, Memory(), fabric=Fabric(Link()))
    assert isinstance(outside.executor, LendingExecutor)
    return outside.executor, outside.num_blocks


def test_queries_and_parts_are_a_ten_thousandth_of_what_is_attended_over() -> None:
    """LLaMA2-7B, 128K positions elsewhere: 16 KB for 2 GB a layer and step."""
    executor, _ = leaf()
    asked = executor._row_bytes / 32
    kept = executor.block_bytes / 16 * 131_072 / 32
    assert asked == 32 * (2 * 128 + 2 * 128 + 4) and kept == 2 * 4096 * 2 * 131_072
    assert kept / asked > 1e4


def most_of(total: int) -> int:
    """Tokens of a prompt, with 1,024 of an answer: half a home, and all but an eighth of the others."""
    return 16 * (total // 2 + 7 * (total - total // 8 - 2)) - 1024


def test_an_idle_fleet_takes_what_its_memory_together_holds() -> None:
    config = fleet("lending", 4096)
    (first,) = config.fleet
    small = dataclasses.replace(first, cache=dataclasses.replace(first.cache, num_blocks=600))
    config = dataclasses.replace(config, fleet=(small,))
    for num_prompt, is_taken in ((most_of(600), True), (most_of(600) + 32, False)):
        finishes = Finishes()
        simulate(config, One(num_prompt), has_gaps=False, listeners=(finishes,))
        assert bool(finishes.names) == is_taken
    _, total = leaf()
    assert most_of(total) > 4 * 16 * total


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn(kind: str) -> None:
    share, shortest, longest = KINDS[kind]
    drawn = [
        Mixed(path=Scale().trace(TRACE, SAMPLE), kind=kind, num=200, seed=seed, rate_per_s=rate)
        for seed, rate in ((1, 1.0), (1, 2.0), (2, 1.0))
    ]
    lengths = [[request.prompt.num_tokens for _, request in each] for each in drawn]
    assert lengths[0] == lengths[1] != lengths[2]  # a rate changes nothing but instants
    long = [each for each in lengths[0] if each >= shortest]
    assert len(long) == round(share * 200) and max(long) <= longest


def rows_of(rates: dict[str, float], longer: float = 7.0) -> list[Row]:
    """As if each variant were in time up to a rate."""
    rows = []
    for settings in plan(Scale(name="full", num_seeds=5), {}):
        variant = str(settings["variant"])
        figures: dict[str, Any] = {"context": 100 * (longer if variant == "lending" else 1)}
        if settings["part"] != "context":
            is_well = float(str(settings["rate"])) <= rates.get(variant, 0.0)
            figures = {"talk_share": 1.0, "long_share": float(is_well), "tokens_per_s": 1.0}
        rows.append(Row(settings=settings, figures=figures))
    return rows


def test_the_plan_has_its_seeds() -> None:
    scale = Scale(name="full", num_seeds=5)
    check_plan(EXPERIMENT, plan(scale, {}), scale)


def test_judging() -> None:
    known = {"tp8-1024": 0.7, "tp8-2048": 1.0}
    found = judge(rows_of({**known, "lending-near": 1.4}))
    assert found.outcome == "reproduced" and "no-lending 0" in found.why
    assert judge(rows_of({**known, "lending-near": 1.0})).outcome == "in part"
    assert judge(rows_of({**known, "lending-near": 1.4}, longer=3.0)).outcome == "in part"
    assert judge(rows_of({**known, "lending-near": 0.7}, longer=3.0)).outcome == "not"
    rates = {each: highest(rows_of(known), "long", each) for each in RUN["long"]}
    assert set(rates["tp8-2048"].values()) == {1.0} and set(rates["lending"].values()) == {0.0}
