"""Stored scheduler times: which entry speaks for which policies, and what a simulation does with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.assemble import load_config
from penstock.assemble.presets import PRESETS, policy_tables
from penstock.core.errors import BadConfig
from penstock.core.events import Stepped
from penstock.cost.profile import Profile, SchedulerCost
from penstock.cost.schedulers import Schedulers, load_schedulers, policies_name, scheduler_of
from penstock.lab.simulate import simulate
from penstock.report.log import LogReader
from penstock.traffic import open_trace

DATA = Path(__file__).parents[2] / "data"


def entry(policies: str, fixed_s: float = 1e-3) -> SchedulerCost:
    return SchedulerCost(fixed_s=fixed_s, per_running_s=0, per_waiting_s=0, policies=policies)


def table_of(*policies: str) -> Schedulers:
    return Schedulers(
        machine={"processor": "abacus"},
        made_on="2026-01-01",
        version="0",
        error=0.0,
        entries=tuple(entry(one, index) for index, one in enumerate(policies)),
    )


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_package_knows_every_preset_by_its_own_entry(preset: str) -> None:
    name = policies_name(policy_tables({"preset": preset}, has_prefix_cache=True))
    found = scheduler_of("stored", name)
    assert found.cost.policies == name and "nearest" not in str(found)
    assert 1e-6 < found.cost.seconds(1, 0) < found.cost.seconds(128, 0) < 0.1
    assert load_schedulers().made_on in str(found) and found.digest in str(found)


def test_the_nearest_entry_shares_the_batch_policy_and_says_that_it_is_near(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    table_of("a/b/c/d", "x/y/c/z", "p/q/other/r").save(path)
    found = scheduler_of(str(path), "x/b/c/z")
    assert found.cost.policies == "x/y/c/z" and "nearest stored to x/b/c/z" in found.source
    assert scheduler_of(str(path), "p/q/c/r").cost.policies == "a/b/c/d"
    with pytest.raises(BadConfig, match="batch policy 'new'"):
        scheduler_of(str(path), "a/b/new/d")


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    table = table_of("a/b/c/d", "e/f/g/h")
    table.save(path)
    assert load_schedulers(path) == table


def test_a_profile_of_a_machine_will_do_too(tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    plain = Profile(model="m", num_layers=1, steps={}, num_steps=1, mape=0, left_out=0)
    plain.save(path)
    with pytest.raises(BadConfig, match="holds no scheduler time"):
        scheduler_of(str(path), "a/b/c/d")
    with pytest.raises(BadConfig, match="there is no scheduler times"):
        scheduler_of(str(tmp_path / "none.json"), "a/b/c/d")


def test_a_simulation_is_charged_and_says_what(tmp_path: Path) -> None:
    """The very first step takes as much longer as the entry says, and the source names the entry."""

    def first_step_s(name: str, *sets: str) -> tuple[float, str, str]:
        log = tmp_path / name
        config = load_config(
            sets=("fleet.0.model=llama-3.1-8b", "fleet.0.executor.gpu=a100-80g", *sets)
        )
        trace = open_trace(DATA / "azure_2023_conv_200.csv", limit=3, model="llama-3.1-8b")
        source = simulate(config, trace, log_path=log).sources[0]
        events = list(LogReader(log))
        stepped = next(one for one in events if isinstance(one, Stepped))
        done = next(one for one in events if one.kind == "completed")
        return done.ends[0] - stepped.at, str(source), events[0].profile

    free_s, free, free_header = first_step_s("free.jsonl")
    charged_s, charged, header = first_step_s("charged.jsonl", "fleet.0.executor.scheduler=stored")
    stored = scheduler_of("stored", "fcfs/full-fit/vllm-v1/recompute-last")
    assert charged_s - free_s == pytest.approx(stored.cost.seconds(1, 0), rel=1e-6)
    assert "scheduler" not in free and str(stored) in charged
    assert stored.digest in header and stored.digest not in free_header
