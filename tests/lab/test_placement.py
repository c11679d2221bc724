"""The search for a placement, whole: what it says, and that its judge agrees with the simulator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.__main__ import build_app
from penstock.cost.links import link_of
from penstock.lab.placed_trial import simulated_tails
from penstock.lab.placement import Asked, Judge, hardware, plan_placement, spec_of
from penstock.lab.placement_picture import plot, table_of, text_of
from penstock.policy.place import Parallel, Site, Unit
from penstock.traffic.lengths import Lognormal

LENGTHS = Lognormal(
    prompt_median=500, output_median=120, prompt_sigma=0.7, output_sigma=0.7, most=1800
)


@pytest.fixture(scope="module")
def judge() -> Judge:
    found = hardware("opt-13b", spec_of("a100-80g", "distserve"))
    return Judge(hardware=found, asked=Asked(lengths=LENGTHS, ttft_s=0.25, tpot_s=0.06, num=80))


def test_attainment_falls_with_the_rate(judge: Judge) -> None:
    pair = Unit(way="disaggregated", parallel=Parallel(1), decode=Parallel(1))
    for unit in (pair, Unit(way="colocated", parallel=Parallel(1))):
        tails = [judge.tails(unit, rate) for rate in (0.2, 1.0, 3.0, 9.0)]
        assert [ttft for ttft, _ in tails] == sorted(ttft for ttft, _ in tails)
        assert tails[0][1] < tails[-1][1]


def test_phases_alone_see_their_own_promise_only(judge: Judge) -> None:
    ttft, tpot = judge.tails(Unit(way="prefill", parallel=Parallel(1)), 2.0)
    assert ttft > 0 and tpot == 0
    ttft, tpot = judge.tails(Unit(way="decode", parallel=Parallel(1)), 2.0)
    assert ttft == 0 and tpot > 0


def test_a_slow_link_costs_tpot(judge: Judge) -> None:
    pair = Unit(way="disaggregated", parallel=Parallel(1), decode=Parallel(1))
    slow = Judge(hardware=judge.hardware, asked=judge.asked, transfer=link_of("ethernet-100"))
    assert slow.tails(pair, 1.0)[0] == judge.tails(pair, 1.0)[0]
    assert slow.tails(pair, 1.0)[1] > judge.tails(pair, 1.0)[1]


def test_the_search_tells_what_it_found(judge: Judge, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    placed = plan_placement(judge, Site(devices_per_node=2), tolerance=0.5)
    text, table = text_of(placed), table_of(placed)
    assert placed.best is not None
    assert placed.best[0] in text and "modelled, nothing ran" in text
    assert set(table["ways"]) == {"disaggregated", "colocated", "chunked 2048"}  # type: ignore[arg-type]
    json.dumps(table)
    plot(tmp_path / "search.png", placed)
    assert (tmp_path / "search.png").stat().st_size > 5000


def test_the_verb_prints_json_and_refuses_in_words() -> None:
    told = [
        "plan",
        "placement",
        "opt-13b",
        "--gpu",
        "a100-80g",
        "--tables",
        "distserve",
        "--gpus",
        "2",
    ]
    promises = ["--ttft", "0.3", "--tpot", "0.08", "--lengths", "400/60"]
    found = CliRunner().invoke(build_app("plan"), [*told, *promises, "--json"])
    assert found.exit_code == 0, found.output
    table = json.loads(found.stdout)
    assert table["best"] in table["ways"]
    assert table["is_simulation"] is True


def test_the_simulator_agrees_where_both_can_tell() -> None:
    """One instance, prompts first: blocks, admission and routing change little while memory suffices."""
    lengths = Lognormal(
        prompt_median=400, output_median=100, prompt_sigma=0.6, output_sigma=0.6, most=900
    )
    found = hardware("opt-13b", spec_of("a100-80g", "distserve"))
    asked = Asked(lengths=lengths, ttft_s=1, tpot_s=1, num=200)
    unit = Unit(way="colocated", parallel=Parallel(2))
    judged = Judge(hardware=found, asked=asked).tails(unit, 2.0)
    told = simulated_tails(asked, 2.0, tables="distserve", tp=2)
    assert told == pytest.approx(judged, rel=0.06)


def test_the_simulator_agrees_on_pairs() -> None:
    """Roles, the hand-over and the pull of blocks add next to nothing, at a load where decodes feel each other."""
    lengths = Lognormal(
        prompt_median=400, output_median=100, prompt_sigma=0.6, output_sigma=0.6, most=900
    )
    found = hardware("opt-13b", spec_of("a100-80g", "distserve"))
    asked = Asked(lengths=lengths, ttft_s=1, tpot_s=1, num=150)
    unit = Unit(way="disaggregated", parallel=Parallel(1), decode=Parallel(1))
    judged = Judge(hardware=found, asked=asked).tails(unit, 4.0)
    told = simulated_tails(asked, 4.0, tables="distserve", tp=1, decode_tp=1)
    assert told == pytest.approx(judged, rel=0.05)


@pytest.mark.parametrize(("tp", "decode_tp"), [(2, 1), (1, 2)])
def test_the_simulator_agrees_on_pairs_of_unequal_degree(tp: int, decode_tp: int) -> None:
    """Steps of either degree, and blocks that are pulled by more devices or by fewer."""
    lengths = Lognormal(
        prompt_median=400, output_median=100, prompt_sigma=0.6, output_sigma=0.6, most=900
    )
    found = hardware("opt-13b", spec_of("a100-80g", "distserve"))
    asked = Asked(lengths=lengths, ttft_s=1, tpot_s=1, num=100)
    unit = Unit(way="disaggregated", parallel=Parallel(tp), decode=Parallel(decode_tp))
    judged = Judge(hardware=found, asked=asked).tails(unit, 4.0)
    told = simulated_tails(
        asked, 4.0, tables="distserve", tp=tp, decode_tp=decode_tp, pull_share=0.05
    )
    assert told == pytest.approx(judged, rel=0.05)
