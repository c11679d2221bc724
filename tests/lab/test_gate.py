"""The gate: on published runs where they are, and on runs that we wrote, whose constants it must find again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.__main__ import build_app
from penstock.core.errors import BadConfig, BadTrace
from penstock.core.rng import stream
from penstock.lab.gate import Constants, Gated, fit, gate, replay, tables_for
from penstock.lab.gate_scores import GATE, GOAL, scores_of
from penstock.lab.gate_text import text_of
from penstock.lab.vllm_logs import Latency, find_logs, read_log
from tests.cost.linear_tables import write_tables


def write_run(folder: Path, seed: int, num: int = 40, hardware: str = "RTXPRO6000") -> Path:
    """A run of which only what was asked is true; its times are filled in by `answer`."""
    folder.mkdir(parents=True)
    chance, at, rows = stream(seed, "run"), 1000.0, []
    for number in range(num):
        at += chance.expovariate(6.0)
        rows.append(
            {
                "request_id": f"r{number}",
                "input_toks": chance.randrange(20, 3000),
                "output_toks": chance.randrange(60, 160),
                "arrival_time": at,
            }
        )
    times = ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
    told = [json.dumps({**row, **dict.fromkeys(times, row["arrival_time"])}) for row in rows]
    (folder / "requests.jsonl").write_text("\n".join(told) + "\n")
    meta = {
        "vllm_version": "0.19.0",
        "model": "meta-llama/Llama-3.1-8B",
        "engine_kwargs": {
            "tensor_parallel_size": 1,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 2048,
        },
        "kv_cache": {"num_gpu_blocks": 4000},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    config = {"nodes": [{"instances": [{"hardware": hardware}]}]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def answer(folder: Path, tables: Path, constants: Constants) -> None:
    """Fill in the times that a host with these constants gives, on a clock of its own."""
    found = replay(read_log(folder), tables, constants)
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    for row, came in zip(rows, found, strict=True):
        arrived_at = row["arrival_time"] - 990.0
        row["queued_ts"] = row["scheduled_ts"] = arrived_at + 0.001
        row["first_token_ts"] = arrived_at + came.ttft_s + 0.001
        row["last_token_ts"] = arrived_at + came.e2e_s + 0.001
    (folder / "requests.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on one host, which takes 5 ms a step with a prefill and 200 ms at first; the folder of their tables."""
    root = tmp_path_factory.mktemp("gate")
    tables = write_tables(root / "tables" / "RTXPRO6000_meta-llama_Llama-3.1-8B_bf16_tp1")
    for seed, name in enumerate(("first", "second")):
        folder = write_run(root / "runs" / name, seed)
        answer(folder, tables, Constants(prefill_s=0.005, first_step_s=0.2))
    return root / "runs", root / "tables"


def test_constants_are_found_again(logs: tuple[Path, Path]) -> None:
    run = read_log(logs[0] / "first")
    found = fit(run, tables_for(run, logs[1]))
    assert found.first_step_s == pytest.approx(0.2, abs=2e-4)
    assert found.prefill_s == pytest.approx(0.005, abs=1e-4)
    assert found.fitted_on == ("first",)


def test_a_run_is_scored_with_the_other_ones_constants(logs: tuple[Path, Path]) -> None:
    told: list[str] = []
    found = gate(*logs, on_done=lambda done, total, text: told.append(f"{done}/{total} {text}"))
    assert [one.constants.fitted_on for one in found] == [("second",), ("first",)]
    assert told[0].startswith("0/4 fitting on first") and told[-1].startswith("3/4 scoring second")
    for one in found:
        assert one.scores.is_through
        assert one.scores.errors["e2e_mape"] < one.unfitted.errors["e2e_mape"] / 2
        assert one.scores.num_not_queued == len(one.real)
    text = text_of(found)
    assert "fitted on second" in text and "2 of 2 runs through" in text and "LLMServing" in text


def test_a_run_alone_is_scored_with_nothing_fitted(logs: tuple[Path, Path]) -> None:
    (alone,) = gate(logs[0] / "first", logs[1])
    assert alone.constants == Constants()
    assert alone.scores == alone.unfitted


def test_the_verb(logs: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "gate.png"
    args = ["bench", "gate", str(logs[0] / "first"), "--op-tables", str(logs[1])]
    done = CliRunner().invoke(build_app("bench"), [*args, "--json", "--plot", str(picture)])
    (told,) = json.loads(done.stdout)
    assert told["run"] == "first" and told["constants"]["fitted_on"] == []
    assert picture.stat().st_size > 10_000
    assert done.exit_code == (0 if told["is_through"] else 1)


def test_scores_by_hand() -> None:
    def latency(ttft_s: float, tpot_s: float, e2e_s: float) -> Latency:
        return Latency(ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=e2e_s)

    real = [latency(1.0, 0.1, 10.0), latency(3.0, 0.2, 20.0)]
    came = [latency(2.0, 0.1, 11.0), latency(3.0, 0.21, 18.0)]
    found = scores_of(real, came, [False, True])
    assert found.errors["ttft_mean"] == pytest.approx(25.0)
    assert found.errors["ttft_mape"] == pytest.approx(50.0)
    assert found.errors["ttft_not_queued_mape"] == pytest.approx(100.0)
    assert found.errors["tpot_p99"] == pytest.approx(5.0)
    assert found.errors["e2e_mape"] == pytest.approx(10.0)
    assert found.is_through
    assert found.beyond({"ttft_mape": 15.0}) == ["ttft_mape +50.0 % (bound 15 %)"]


def test_what_is_no_run_is_told(logs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BadTrace, match="holds no logged runs"):
        find_logs(tmp_path)
    folder = write_run(tmp_path / "odd", 1, num=2, hardware="ABACUS")
    with pytest.raises(BadTrace, match="no card is known as 'ABACUS'"):
        read_log(folder)
    (folder / "requests.jsonl").write_text('{"request_id": "a"}\n')
    with pytest.raises(BadTrace, match="KeyError: 'arrival_time'"):
        read_log(folder)
    (folder / "config.json").unlink()
    with pytest.raises(BadTrace, match=r"config\.json, which is not there"):
        read_log(folder)
    with pytest.raises(BadConfig, match="no tables for the run first"):
        gate(logs[0] / "first", tmp_path)


@pytest.fixture(scope="module")
def published(penstock_data: Path) -> list[Gated]:
    return gate(penstock_data / "vllm_logs", penstock_data / "op_tables")


def test_published_runs_are_within_the_gate(published: list[Gated]) -> None:
    assert len(published) >= 3
    for one in published:
        assert one.scores.is_through, (one.log.name, one.scores.beyond(GATE))
        assert one.log.name not in one.constants.fitted_on


def test_runs_on_the_rtx_pro_reach_the_goal(published: list[Gated]) -> None:
    wanted = [one for one in published if one.has_goal]
    assert len(wanted) == 2
    for one in wanted:
        assert not one.scores.beyond(GOAL), one.log.name


def test_tables_beat_the_roofline(published: list[Gated]) -> None:
    """With nothing fitted either; by requests, where no error cancels another."""
    for one in published:
        for figure in ("tpot_mape", "e2e_mape"):
            assert one.unfitted.errors[figure] < one.roofline.errors[figure], one.log.name
