"""`penstock bench faults`: the table, what broke and how to see it again, and the file of what happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.__main__ import run
from penstock.cluster.link import ReplicaLink


def test_the_table_has_a_row_for_each_kind_and_a_single_run_is_written_down(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = ["bench", "faults", "--seeds", "2", "--fault", "kill", "--fault", "cut"]
    assert run([*args, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["fault"] for row in told["faults"]] == ["kill", "cut"] and not told["broken"]
    for row in told["faults"]:
        assert row["answered"] + row["cancelled"] + row["errors"] == row["requests"] > 0
    log = tmp_path / "run.jsonl"
    assert run(["bench", "faults", "--first", "3", "--seeds", "1", "--log", str(log)]) == 0
    kinds = {json.loads(line)["kind"] for line in log.read_text().splitlines()}
    assert {"fault", "arrived", "routed", "stepped", "finished"} <= kinds


def test_a_run_that_breaks_says_how_to_see_it_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReplicaLink, "_hear_outputs", lambda link, message: None)
    assert run(["bench", "faults", "--seeds", "1", "--first", "40", "--fault", "skew"]) == 1
    told = capsys.readouterr().out
    assert "lost" in told and "--seeds 1 --fault skew --log faults-40.jsonl" in told


def test_an_unknown_fault_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "faults", "--fault", "flood"]) == 2
    told = capsys.readouterr().err
    assert "no fault called flood" in told and "kill" in told
