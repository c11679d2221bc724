"""Whole simulations: equal runs are equal bit for bit, say what they are, and keep every request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.__main__ import run as penstock
from penstock.assemble import Config, load_config
from penstock.core.errors import BadConfig, BadModel
from penstock.core.events import Finished, Header
from penstock.core.types import SCHEMA, Slo
from penstock.lab.replay import replay, replay_log
from penstock.lab.simulate import Simulated, simulate
from penstock.report.log import LogReader
from penstock.traffic import open_trace
from penstock.traffic.custom import parse_columns

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "azure_a100.toml"
AZURE = ROOT / "data" / "azure_2023_conv_200.csv"
MOONCAKE = ROOT / "data" / "mooncake_conversation_100.jsonl"


def config(*sets: str) -> Config:
    return load_config(EXAMPLE, sets=sets)


def simulated(
    *sets: str, trace: Path = AZURE, limit: int = 60, speed: float = 1.0, log: Path | None = None
) -> Simulated:
    slo = Slo(ttft_s=0.2)
    traffic = open_trace(trace, limit=limit, speed=speed, model="llama-3.1-8b", slo=slo)
    return simulate(config(*sets), traffic, log_path=log)


def test_equal_arguments_give_equal_runs_under_any_hash_seed() -> None:
    code = (
        "import sys; from pathlib import Path; from penstock.assemble import load_config\n"
        "from penstock.lab.simulate import simulate; from penstock.traffic import open_trace\n"
        "config = load_config(Path(sys.argv[1]), sets=['fleet.0.policy.route=prefix'])\n"
        "trace = open_trace(Path(sys.argv[2]), limit=40, model='llama-3.1-8b')\n"
        "print(simulate(config, trace).digest)\n"
    )

    def digest(hash_seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(EXAMPLE), str(MOONCAKE)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    assert digest("0") == digest("4711") != ""


def test_another_seed_or_configuration_is_another_run() -> None:
    route = "fleet.0.policy.route=p2c"
    same = {simulated(route).digest for _ in range(2)}
    assert len(same) == 1
    assert simulated(route, "seed=1").digest not in same
    assert simulated(route, "fleet.0.replicas=3").digest not in same


def test_every_request_ends_with_its_traced_length(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    found = simulated(log=log)
    assert found.played.num_served == 60 == found.figures.all.num_finished
    assert not found.played.errors
    trace = open_trace(AZURE, limit=60, model="llama-3.1-8b")
    wanted = {request.id: request.true_output for _, request in trace}
    events = list(LogReader(log))
    ended = {one.request: one.num_output for one in events if isinstance(one, Finished)}
    assert ended == wanted
    header = events[0]
    assert isinstance(header, Header) and header.profile == found.sources[0].digest
    assert len(events) == found.num_events


def test_thrashing_memory_loses_nothing_and_breaks_no_law() -> None:
    tight = ("fleet.0.cache.num_blocks=700", "fleet.0.replicas=1", "is_checked=true")
    found = simulated(*tight, limit=120, speed=4.0)
    assert found.figures.all.num_finished == 120
    assert found.figures.all.num_preemptions > 0


def test_the_log_of_a_simulation_replays(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    simulated("fleet.0.cache.num_blocks=400", trace=AZURE, log=log, limit=50)
    outcomes = replay(log)
    assert {one.who for one in outcomes} >= {"llama-3.1-8b-0", "llama-3.1-8b-3"}
    assert all(one.difference is None for one in outcomes)
    assert sum(one.num_decisions for one in outcomes) > 100


def test_prefixes_of_a_trace_are_found_again() -> None:
    sets = ("fleet.0.policy.route=prefix", "fleet.0.replicas=1")
    found = simulated(*sets, trace=MOONCAKE, limit=40)
    assert found.figures.all.cached_tokens > 0
    without = simulated(*sets, "fleet.0.cache.prefix=false", trace=MOONCAKE, limit=40)
    assert without.figures.all.cached_tokens == 0


def test_a_slow_link_shows_in_the_time_to_the_first_token() -> None:
    near, far = simulated(), simulated("net.latency_s=0.25")
    assert near.figures.all.e2e_s.mean is not None and far.played.ended_at is not None
    assert far.played.ended_at > near.played.ended_at + 0.4
    assert far.digest != near.digest


def test_it_says_that_it_is_a_simulation_and_of_what(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["simulate", str(EXAMPLE), "--trace", str(AZURE), "--limit", "20"]
    assert penstock(args) == 0
    shown = capsys.readouterr().out
    for word in ("SIMULATED", "a100-80g", "2024-04", "llama-3.1-8b", "roofline", "20 requests"):
        assert word in shown, word
    assert penstock([*args, "--json", "--seed", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == SCHEMA
    assert told["is_simulation"] is True and told["seed"] == 3
    assert told["sources"][0]["card"] == "a100-80g" and told["sources"][0]["as_of"] == "2024-04"
    assert told["figures"]["all"]["num_finished"] == 20


def test_what_cannot_be_simulated_is_said_before_it_runs() -> None:
    with pytest.raises(BadConfig, match="needs `gpu` or `profile`"):
        simulate(load_config(model="llama-3.1-8b"), open_trace(AZURE, limit=1))
    with pytest.raises(BadModel, match="no model shape"):
        simulated("fleet.0.model=elephant")
    with pytest.raises(BadConfig, match="no room"):
        simulated("fleet.0.model=llama-3.1-70b", "fleet.0.name=llama-3.1-8b")


def test_a_trace_that_asks_for_another_model_is_refused_and_counted() -> None:
    found = simulate(config(), open_trace(AZURE, limit=5, model="gpt-9"))
    assert found.played.errors == {"UnknownModel": 5} and not found.figures.all.num_finished
    assert found.figures.errors == {"UnknownModel": 5}


def test_a_simulation_that_served_nothing_says_so_and_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["simulate", str(EXAMPLE), "--trace", str(AZURE), "--limit", "20"]
    assert penstock([*args, "--model", "gpt-9"]) == 1
    told = capsys.readouterr()
    assert "errors: 20 UnknownModel" in told.out
    assert "NOTHING WAS SERVED\n  20 UnknownModel: no model is named 'gpt-9'" in told.err
    assert "llama-3.1-8b" in told.err


def test_a_promise_that_is_no_time_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["simulate", str(EXAMPLE), "--trace", str(AZURE)]
    for flag in ("--slo-ttft", "--slo-tpot"):
        assert penstock([*args, flag, "-1"]) == 2
        told = capsys.readouterr().err
        assert "must be a positive number of seconds, got -1" in told and "Traceback" not in told


def test_requests_turned_away_by_several_replicas_count_once() -> None:
    """Overload: some are refused by all replicas, some are served by another than the first."""
    found = simulated("fleet.0.max_waiting=1", "fleet.0.cache.num_blocks=400", speed=20.0)
    counts = found.figures.all
    assert counts.num_offered == counts.num_refused + counts.num_finished == 60
    assert counts.num_refused == found.figures.errors["Overloaded"] > 0
    assert len(found.figures.classes) == len(found.figures.tenants) == 1
    assert counts.num_met <= counts.num_finished and counts.attainment == counts.num_met / 60


def test_requests_turned_away_at_the_door_keep_their_tenant(tmp_path: Path) -> None:
    """A bound on the whole fleet refuses before anybody has arrived; reports and replay know whose they were."""
    trace = tmp_path / "burst.csv"
    rows = [f"{at / 100},{team},100,50" for at in range(20) for team in ("a", "b")]
    trace.write_text("\n".join(["at,team,in,out", *rows]) + "\n")
    config = load_config(
        model="llama-3.1-8b",
        flags={
            "fleet.0.executor": {"kind": "modelled", "gpu": "a100-80g"},
            "fleet.0.max_outstanding": 4,
        },
    )
    columns = parse_columns("arrival=at,prompt=in,output=out,tenant=team")
    log = tmp_path / "log.jsonl"
    found = simulate(config, open_trace(trace, columns=columns, model="llama-3.1-8b"), log_path=log)
    figures = found.figures
    assert set(figures.tenants) == {"a", "b"}
    assert figures.all.num_offered == 40 and figures.all.num_refused > 0
    assert sum(each.num_refused for each in figures.tenants.values()) == figures.all.num_refused
    assert all(outcome.difference is None for outcome in replay_log(log))
