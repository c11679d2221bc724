"""Sweeps: a point is the single run with its settings, whatever runs it, and the same command goes on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from penstock.__main__ import run as penstock
from penstock.assemble import load_config
from penstock.core.errors import BadConfig, BadTrace
from penstock.core.types import Slo
from penstock.lab.grid import grid
from penstock.lab.points import Result
from penstock.lab.simulate import simulate
from penstock.lab.sweep import Sweep, Traffic, plan, run_sweep
from penstock.lab.sweep_files import NEEDED
from penstock.traffic import open_trace

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "azure_a100.toml"
AZURE = ROOT / "data" / "azure_2023_conv_200.csv"
SHAREGPT = ROOT / "data" / "sharegpt_schema_60.jsonl"
needs_lab = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="pyarrow and plotly are not installed (extra `lab`)",
)
ONE = ("fleet.0.replicas=1",)
SLO = Slo(ttft_s=0.5, tpot_s=0.05)


def sweep(
    *sweeps: str, compare: tuple[str, ...] = (), num_seeds: int = 1, trace: Path = AZURE
) -> Sweep:
    return Sweep(
        config=EXAMPLE, trace=trace, axes=grid(sweeps, compare), sets=ONE, num_seeds=num_seeds,
        traffic=Traffic(limit=40, slo=SLO),
    )  # fmt: skip


def test_a_point_is_the_single_run_with_its_settings() -> None:
    given = sweep("rate=2,6", compare=("policy.batch=vllm,sglang",), num_seeds=2)
    rows = run_sweep(plan(given), AZURE, processes=1)
    assert len(rows) == 2 * 2 * 2
    own = open_trace(AZURE, limit=40)
    arrivals = [at for at, _ in own]
    own_rate = 39 / (arrivals[-1] - arrivals[0])
    row = rows[-1]
    assert (row["variant"], row["rate"], row["seed"]) == ("batch=sglang", 6, 1)
    sets = (*ONE, "fleet.0.policy.preset=sglang", "seed=1")
    trace = open_trace(AZURE, limit=40, speed=6 / own_rate, model="llama-3.1-8b", slo=SLO, seed=1)
    single = simulate(load_config(EXAMPLE, sets=sets), trace)
    figures = single.figures.all
    assert row["num_events"] == single.num_events
    assert row["attainment"] == figures.attainment and row["goodput_per_s"] == figures.goodput_per_s
    assert row["ttft_p99_s"] == figures.ttft_s.p99 and row["tpot_mean_s"] == figures.tpot_s.mean
    assert row["worst_class"] == figures.attainment and row["num_steps"] == single.figures.num_steps


@needs_lab
def test_a_points_digest_is_the_single_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = [
        "simulate",
        str(EXAMPLE),
        "--trace",
        str(AZURE),
        "--limit",
        "30",
        "--slo-ttft",
        "1",
        "--json",
    ]
    assert penstock([*flags, "--speed", "3", "--set", "fleet.0.replicas=2", "--seed", "5"]) == 0
    single = json.loads(capsys.readouterr().out)
    many = [
        "--sweep",
        "speed=1,3",
        "--sweep",
        "replicas=1,2",
        "--seed",
        "5",
        "--out",
        str(tmp_path),
    ]
    assert penstock([*flags, *many, "--processes", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    (row,) = [each for each in told["rows"] if (each["speed"], each["replicas"]) == (3, 2)]
    assert row["digest"] == single["digest"] and row["num_events"] == single["num_events"]
    assert row["e2e_p99_s"] == single["figures"]["all"]["e2e_s"]["p99"]
    assert {each["digest"] for each in told["rows"]} == {*(each["digest"] for each in told["rows"])}
    assert len({each["digest"] for each in told["rows"]}) == 4


def untimed(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{name: value for name, value in row.items() if name != "cpu_s"} for row in rows]


def test_two_processes_or_one_and_stopped_or_not_give_the_same(tmp_path: Path) -> None:
    planned = plan(sweep("poisson=2,4", num_seeds=3))
    store = tmp_path / "points.jsonl"

    def stop_after_two(done: int, total: int, result: Result) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(planned, AZURE, store=store, processes=1, on_progress=stop_after_two)
    seen: list[bool] = []
    beside = run_sweep(
        planned,
        AZURE,
        store=store,
        processes=2,
        on_progress=lambda *told: seen.append(told[2].is_kept),
    )
    assert sum(seen) == 2 and len(seen) == 6
    alone = run_sweep(planned, AZURE, processes=1)
    assert untimed(beside) == untimed(alone)
    assert len({row["ttft_mean_s"] for row in alone}) == 6  # every seed draws arrivals of its own


def test_rates_are_met_whatever_the_trace_and_speed_is_told_as_a_rate() -> None:
    for each in plan(sweep("rate=0.5:2:0.5")):
        told = each.point.settings["traffic"]
        assert isinstance(told, dict)
        arrivals = [at for at, _ in open_trace(AZURE, limit=40, speed=told["speed"])]
        assert (
            39 / (arrivals[-1] - arrivals[0])
            == pytest.approx(each.offered_per_s)
            == each.spot.load[1]
        )  # type: ignore[index]
    slow, fast = plan(sweep("speed=1,2"))
    assert fast.offered_per_s == pytest.approx(2 * slow.offered_per_s)


def test_a_trace_without_times_gets_poisson_arrivals() -> None:
    (point,) = plan(sweep("rate=3", trace=SHAREGPT))
    assert point.point.settings["traffic"]["rate_per_s"] == 3 == point.offered_per_s  # type: ignore[index]
    with pytest.raises(BadTrace, match="no arrival times"):
        plan(sweep("replicas=1,2", trace=SHAREGPT))


def test_what_cannot_run_is_named_before_anything_runs() -> None:
    with pytest.raises(BadConfig, match="batch=vlm"):
        plan(sweep("rate=1", compare=("policy.batch=vllm,vlm",)))
    with pytest.raises(BadConfig, match="replicas=0.*at least 1"):
        plan(sweep("replicas=0,1"))
    with pytest.raises(BadConfig, match="gpu=h1000"):
        plan(sweep("executor.gpu=a100-80g,h1000"))
    with pytest.raises(BadConfig, match="seeds must be"):
        sweep("rate=1", num_seeds=0)


def test_keys_know_what_changes_a_result(tmp_path: Path) -> None:
    def key(given: Sweep) -> str:
        return plan(given)[0].point.key

    copy = tmp_path / AZURE.name
    copy.write_bytes(AZURE.read_bytes())
    same = key(sweep("rate=1,2"))
    assert key(sweep("rate=1,3", trace=copy)) == same
    copy.write_bytes(AZURE.read_bytes().replace(b"374", b"375", 1))
    assert key(sweep("rate=1,3", trace=copy)) != same
    assert key(sweep("rate=2,3")) != same


@needs_lab
def test_the_verb_prints_a_table_an_answer_and_leaves_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from pyarrow import parquet

    flags = [
        "simulate",
        str(EXAMPLE),
        "--trace",
        str(AZURE),
        "--set",
        "fleet.0.replicas=1",
        "--slo-ttft",
        "0.3",
    ]
    flags += ["--limit", "60", "--sweep", "rate=2,20", "--compare", "policy.batch=vllm,sglang"]
    flags += ["--compare", "policy.route=least", "--processes", "1", "--out", str(tmp_path)]
    assert penstock(flags) == 0
    told = capsys.readouterr().out
    assert "SIMULATED" in told and "batch=vllm, route=least" in told and "TTFT p99" in told
    assert "batch=vllm, route=least carries" in told and "batch=sglang, route=least carries" in told
    table = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(row["policy.batch"], row["rate"]) for row in table] == [
        ("vllm", 2), ("vllm", 20), ("sglang", 2), ("sglang", 20),
    ]  # fmt: skip
    assert all(
        row["error"] is None and len(row["digest"]) > 10 and row["trace_sha256"] for row in table
    )
    assert all("[[fleet]]" in row["config"] and row["version_penstock"] for row in table)
    page = (tmp_path / "report.html").read_text()
    assert "Goodput against load" in page and "batch=sglang" in page
    assert penstock([*flags, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [row["digest"] for row in again["rows"]] == [row["digest"] for row in table]


def test_a_csv_of_ones_own_and_a_workload_are_swept_too(tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    own.write_text("ts,in,out\n" + "".join(f"{i * 0.5},{100 + i},20\n" for i in range(12)))
    traffic = Traffic(columns="arrival=ts,prompt=in,output=out", slo=SLO)
    given = Sweep(config=EXAMPLE, trace=own, axes=grid(["rate=4"], []), sets=ONE, traffic=traffic)
    (row,) = run_sweep(plan(given), own, processes=1)
    assert row["num_finished"] == 12 and row["prompt_tokens"] == sum(range(100, 112))
    workload = tmp_path / "w.toml"
    text = 'num_requests = 12\n[arrivals]\nkind = "poisson"\nrate_per_s = 2.0\n'
    text += '[lengths]\nkind = "empirical"\npath = "p.csv"\n'
    workload.write_text(text)
    (tmp_path / "p.csv").write_text("num_prefill_tokens,num_decode_tokens\n100,20\n90,10\n")
    given = Sweep(config=EXAMPLE, trace=workload, axes=grid(["rate=4"], []), sets=ONE, num_seeds=2)
    planned = plan(given)
    rows = run_sweep(planned, workload, processes=1)
    assert [row["num_finished"] for row in rows] == [12, 12]
    assert rows[0]["ttft_mean_s"] != rows[1]["ttft_mean_s"]
    (tmp_path / "p.csv").write_text("num_prefill_tokens,num_decode_tokens\n100,20\n90,11\n")
    assert plan(given)[0].point.key != planned[0].point.key


@needs_lab
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--sweep", "rate=1,2", "--log", "x.jsonl"], "--log belongs to a single run"),
        (["--sweep", "rate=1,2", "--rate", "3"], "--rate and --sweep rate both state the load"),
        (["--sweep", "speed=1,2", "--speed", "3"], "--speed and --sweep speed both"),
        (["--processes", "2"], "--processes belongs to a sweep"),
        (["--processes", "0"], "--processes belongs to a sweep"),
        (["--out", "x"], "--out belongs to a sweep"),
        (["--sweep", "rate=2:1:1"], "--sweep rate: the range"),
        (["--compare", "polcy.batch=vllm"], "did you mean 'policy'"),
        (["--compare", "policy.batch=vllm,nope"], "batch=nope"),
        (["--sweep", "rate=1,2", "--seeds", "0"], "seeds must be at least 1"),
    ],
)
def test_flags_that_make_no_sense_are_told(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert penstock(["simulate", str(EXAMPLE), "--trace", str(AZURE), *flags]) == 2
    assert told in capsys.readouterr().err


@needs_lab
def test_points_that_fail_are_told_and_the_others_stand(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import penstock.lab.sweep as module

    def fragile(config: object, trace: object) -> object:
        if config.fleet[0].replicas == 2:  # type: ignore[attr-defined]
            raise ValueError("two is too many")
        return simulate(config, trace)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "simulate", fragile)
    flags = [
        "simulate",
        str(EXAMPLE),
        "--trace",
        str(AZURE),
        "--limit",
        "20",
        "--sweep",
        "replicas=1,2",
    ]
    assert penstock([*flags, "--processes", "1", "--out", str(tmp_path)]) == 1
    seen = capsys.readouterr()
    assert (
        "1 of 2 points failed" in seen.out
        and "replicas=2, seed 0: ValueError: two is too many" in seen.err
    )
