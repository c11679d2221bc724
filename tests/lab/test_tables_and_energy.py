"""Simulations on operator tables, and what they tell of energy and money."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.assemble import Config, FleetConfig
from penstock.cluster.spec import ExecutorSpec
from penstock.core.config import build
from penstock.lab.simulate import Simulated, simulate
from penstock.traffic import open_trace
from tests.cost.linear_tables import write_tables

TRACE = Path(__file__).parents[2] / "data" / "azure_2023_conv_200.csv"


def simulated(replicas: int = 1, **executor: Any) -> Simulated:
    spec = ExecutorSpec(kind="modelled", **executor)
    fleet = FleetConfig(model="llama-3.1-8b", replicas=replicas, executor=spec)
    trace = open_trace(TRACE, model="llama-3.1-8b", limit=60)
    return simulate(Config(fleet=(fleet,)), trace, has_gaps=False)


def test_a_simulation_tells_energy_and_rent() -> None:
    found = simulated(gpu="h100", replicas=2)
    (fleet,) = found.energy
    duration, tokens = found.figures.duration_s, found.figures.all.output_tokens
    assert fleet.joules is not None and fleet.idle_j is not None and fleet.mean_watts is not None
    assert fleet.joules == found.energy_j
    assert 0 < fleet.idle_j < 2 * 27 * duration < fleet.joules < 2 * 700 * duration
    assert fleet.mean_watts == pytest.approx(fleet.joules / duration)
    assert fleet.dollars == pytest.approx(2 * 7.516 * duration / 3600)
    assert fleet.dollars_per_million_output == pytest.approx(fleet.dollars / tokens * 1e6)
    assert found.to_dict()["energy"]


def test_a_lower_clock_draws_less() -> None:
    full, low = simulated(gpu="h100"), simulated(gpu="h100", clock=0.6)
    assert full.energy_j is not None and low.energy_j is not None
    assert low.energy_j < full.energy_j
    assert (low.figures.all.ttft_s.mean or 0) > (full.figures.all.ttft_s.mean or 0)


def test_tables_are_named_and_engines_count(tmp_path: Path) -> None:
    tables = write_tables(tmp_path / "of-mine")
    plain = simulated(gpu="rtx-pro-6000", op_tables=tables)
    assert "operator tables of-mine [" in str(plain.sources[0])
    vllm = simulated(gpu="rtx-pro-6000", op_tables=tables, engine="vllm 0.19")
    slow = simulated(
        gpu="rtx-pro-6000", op_tables=tables, engine="vllm 0.19", engine_costs={"prefill_s": 0.5}
    )
    means = [one.figures.all.ttft_s.mean or 0.0 for one in (plain, vllm, slow)]
    assert means[0] < means[1] and means[2] > means[1] + 0.4
    assert len({one.sources[0].digest for one in (plain, vllm, slow)}) == 3
    assert plain.energy_j is not None


def test_a_configuration_file_names_tables() -> None:
    spec = build(
        ExecutorSpec,
        {"kind": "modelled", "gpu": "h100", "tables": "aiconfigurator", "engine": "vllm 0.19",
         "engine_costs": {"prefill_s": 0.001}},
    )  # fmt: skip
    assert spec.engine_costs == {"prefill_s": 0.001}
