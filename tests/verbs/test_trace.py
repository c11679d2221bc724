"""`penstock trace ...` and workloads on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.__main__ import run
from penstock.traffic import open_trace
from tests.traffic.written_workloads import FIXED, LENGTHS, POISSON, workload

ROOT = Path(__file__).parents[2]
AZURE = ROOT / "data" / "azure_2023_conv_200.csv"
EXAMPLE = ROOT / "examples" / "azure_a100.toml"
Capture = pytest.CaptureFixture[str]


def test_card(capsys: Capture, tmp_path: Path) -> None:
    assert run(["trace", "card", str(AZURE)]) == 0
    assert "200 of 200 rows" in capsys.readouterr().out
    assert run(["trace", "card", str(AZURE), "--json", "--limit", "20"]) == 0
    assert json.loads(capsys.readouterr().out)["rows_kept"] == 20
    pytest.importorskip("matplotlib")
    assert run(["trace", "card", str(AZURE), "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_generate_and_read_back(capsys: Capture, tmp_path: Path) -> None:
    path = workload(tmp_path, f"duration_s = 30\n{POISSON}{LENGTHS}sessions = {{turns = 2}}")
    for name in ("a.jsonl", "a.csv"):
        out = tmp_path / name
        assert (
            run(["trace", "generate", str(path), "--out", str(out), "--seed", "3", "--json"]) == 0
        )
        told = json.loads(capsys.readouterr().out)
        made = open_trace(path, seed=3)
        num = sum(1 for _ in made) * 2
        assert told["rows_kept"] == num == made.meta.rows_kept
    assert run(["trace", "generate", str(path), "--out", str(tmp_path / "a.xlsx")]) == 2
    assert "cannot tell what" in capsys.readouterr().err


def test_fit_gives_a_workload_that_can_be_played(capsys: Capture, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    out = tmp_path / "like.toml"
    assert run(["trace", "fit", str(AZURE), "--out", str(out), "--seeds", "2"]) == 0
    told = capsys.readouterr().out
    assert "KS of prompt lengths" in told and "like.model.json" in told
    span_s = max(at_s for at_s, _ in open_trace(AZURE))
    made = list(open_trace(out))
    assert 100 < len(made) < 320 and made[-1][0] <= span_s
    assert run(["trace", "fit", str(AZURE), "--json", "--seeds", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]
    assert run(["trace", "fit", str(AZURE), "--lengths", "normal"]) == 2
    assert run(["trace", "fit", str(AZURE), "--out", str(tmp_path / "like.txt")]) == 2


def test_simulate_takes_workloads_and_prints_their_cards(capsys: Capture, tmp_path: Path) -> None:
    text = f"duration_s = 5\n{POISSON}{FIXED}programs = {{shape = 'fan_out', width = 2}}"
    path = workload(tmp_path, text)
    assert run(["simulate", str(EXAMPLE), "--trace", str(path)]) == 0
    told = capsys.readouterr().out
    assert "programs" in told and "ended whole" in told and "card    " in told
    assert run(["simulate", str(EXAMPLE), "--trace", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["played"]["workflows"]["program"]["num_whole"] > 5


def test_simulate_takes_a_csv_of_ones_own(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("ts,in_tokens,out_tokens\n0,50,5\n1000,50,5\n2000,80,9\n")
    line = ["simulate", str(EXAMPLE), "--trace", str(path), "--columns"]
    assert run([*line, "arrival=ts:ms,prompt=in_tokens,output=out_tokens"]) == 0
    assert "3 of 3 rows, 1.50 req/s over 2 s" in capsys.readouterr().out
    assert run([*line, "arrival=when,prompt=in_tokens,output=out_tokens"]) == 2
    assert "has no column 'when'" in capsys.readouterr().err
    assert run(["simulate", str(EXAMPLE), "--trace", str(path)]) == 2
    assert "--columns" in capsys.readouterr().err


def test_mistakes_in_a_workload_are_a_line_and_no_traceback(
    capsys: Capture, tmp_path: Path
) -> None:
    path = workload(tmp_path, f"duration = 5\n{POISSON}{FIXED}")
    assert run(["simulate", str(EXAMPLE), "--trace", str(path)]) == 2
    told = capsys.readouterr().err
    assert "did you mean 'duration_s'" in told and "Traceback" not in told
