"""A fleet under prompts that begin alike: decisions are taken again from the log, and the ledger restores loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from penstock.core.events import BlocksTold, Routed
from penstock.core.prompt import TracedPrompt
from penstock.lab.replay import replay
from penstock.lab.routing import TRAFFICS, UNIT, Arrivals, deployment_of, routed, tool_calls
from penstock.lab.simulate import simulate
from penstock.report.log import LogReader

TOOLS = TRAFFICS["tools"]


@pytest.mark.parametrize("name", ["dualmap", "mooncake"])
def test_decisions_on_blocks_ledger_and_queues_are_replayed(name: str, tmp_path: Path) -> None:
    rows = tool_calls(150, seed=1, cut=TOOLS.cut)
    config = deployment_of({"name": name, "slo_s": 2.0}, TOOLS, "1 s+", tmp_path)
    arrivals = Arrivals(rows=rows, rate_per_s=20.0, slo_s=2.0)
    path = tmp_path / "log.jsonl"
    simulate(config, arrivals, log_path=path, has_gaps=False)
    outcomes = {outcome.who: outcome for outcome in replay(path)}
    fleet = outcomes["fleet-default"]
    assert fleet.difference is None, fleet.difference
    events = list(LogReader(path).of("fleet-default"))
    assert sum(isinstance(event, Routed) for event in events) == 150
    assert any(isinstance(event, BlocksTold) for event in events)
    assert all(outcome.difference is None for outcome in outcomes.values())


def test_old_loads_cost_promises_and_the_ledger_brings_them_back() -> None:
    rows = tool_calls(450, seed=2, cut=TOOLS.cut)
    kept = {
        regime: routed(
            {"name": "least-tokens"},
            rows,
            traffic=TOOLS,
            regime=regime,
            rate_per_s=7.5,
            warm_up=50,
        )["kept"]
        for regime in ("fresh", "5 s", "5 s+")
    }
    assert kept["5 s"] < kept["fresh"] - 5  # type: ignore[operator]
    assert abs(kept["5 s+"] - kept["fresh"]) < 4  # type: ignore[operator]


def test_tool_calls_begin_alike_in_the_shares_they_were_made_with() -> None:
    rows = tool_calls(4000, seed=3, cut=TOOLS.cut)
    ids = [prompt.hash_ids for _, prompt in rows]  # type: ignore[attr-defined]
    assert sum(each[:13] == tuple(range(13)) for each in ids) / 4000 == pytest.approx(
        0.378, abs=0.03
    )
    assert sum(each[1] == 100 for each in ids) / 4000 == pytest.approx(0.149, abs=0.03)
    assert all(each[0] == 0 for each in ids)
    assert all(prompt.num_tokens <= TOOLS.cut for _, prompt in rows)


def test_a_fleet_that_takes_nobody_has_a_result() -> None:
    rows = [(0.1 * place, TracedPrompt(64 * UNIT)) for place in range(9)]  # longer than any memory
    tiny = dataclasses.replace(TOOLS, blocks=8)
    told = routed(
        {"name": "on-demand"}, rows, traffic=tiny, regime="1 s", rate_per_s=9.0, warm_up=1
    )
    assert told["kept"] == 0 and told["ttft_p50_s"] is None and told["hit"] == 0
