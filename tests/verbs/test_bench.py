"""`penstock bench` and `penstock replay` from the command line: files, JSON, exit codes."""

from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path

import pytest
from msgspec import structs

from penstock.__main__ import run
from penstock.core.events import Event, Header, Stepped
from penstock.core.types import SCHEMA
from penstock.lab.replay import TOLD_EVERY, replay_log
from penstock.report.log import LogWriter
from tests.lab.little_server import Little, serving
from tests.lab.test_replay import made, virtual_log

AZURE = Path(__file__).parents[2] / "data" / "azure_2023_conv_200.csv"
BENCH = ["--trace", str(AZURE), "--limit", "12", "--speed", "50"]


async def bench(little: Little, *args: str) -> int:
    async with serving(little) as url:
        return await asyncio.to_thread(run, ["bench", url, *BENCH, *args])


async def test_a_report_on_screen_and_in_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "report.json", tmp_path / "run.png"
    code = await bench(Little(), "--out", str(out), "--plot", str(plot), "--slo-ttft", "60")
    told = capsys.readouterr().out
    assert code == 0
    for word in ("little at http", "12 offered, 12 finished", "TTFT", "attainment 100.0%", "trace"):
        assert word in told
    found = json.loads(out.read_text())
    assert found["schema"] == SCHEMA
    assert found["figures"]["all"]["num_met"] == 12 and found["slo"]["ttft_s"] == 60
    assert found["trace"]["rows_kept"] == 12 and found["client_lateness_s"]["num"] == 12
    assert plot.read_bytes().startswith(b"\x89PNG")


async def test_json_alone_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert await bench(Little(), "--json") == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["figures"]["all"]["num_finished"] == 12 and found["model"] == "little"
    assert found["schema"] == SCHEMA and told.err.count("\n") < 5


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_a_terminal_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert await bench(Little(token_s=0.005)) == 0
    told = re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"answered .* \d+/12 ", told), told
    assert re.search(r"\d+ running  TTFT p50 \S+", told) and "TPOT p50" in told


async def test_a_server_that_answers_nothing_is_a_failure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert await bench(Little(statuses=[503] * 12)) == 1
    told = capsys.readouterr()
    assert "12 HTTP 503" in told.out
    assert "NOTHING WAS SERVED\n  12 HTTP 503: no: " in told.err
    assert await bench(Little(), "--out", str(tmp_path / "none" / "x.json")) == 2
    assert "cannot write" in capsys.readouterr().err


def write(path: Path, events: list[Event]) -> Path:
    log = LogWriter(path)
    log.emit(Header(who="replica-0"))
    for event in events:
        log.emit(event)
    log.close()
    return path


def test_replay_says_identical_or_where_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    events = virtual_log(0, made())
    path = write(tmp_path / "a.jsonl", events)
    assert run(["replay", str(path)]) == 0
    assert re.fullmatch(r"replica-0: \d+ decisions, all identical\n", capsys.readouterr().out)
    place = [i for i, event in enumerate(events) if isinstance(event, Stepped)][40]
    events[place] = structs.replace(events[place], digest="another", why="a whim")
    write(tmp_path / "b.jsonl", events)
    assert run(["replay", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "decision 41 differs" in told and "they differ in digest, why" in told
    assert "after 40 identical ones" in told and "1 of 2 logs identical" in told
    assert run(["replay", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == SCHEMA
    assert [outcome["difference"] is None for outcome in found["outcomes"]] == [True, False]


def test_replay_tells_how_far_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", virtual_log(0, made()))
    num_lines = path.read_bytes().count(b"\n")
    heard: list[tuple[int, int]] = []
    replay_log(path, lambda done, total: heard.append((done, total)))
    assert heard == [(done, num_lines) for done in range(0, num_lines - 1, TOLD_EVERY)]
    assert len(heard) > 1
