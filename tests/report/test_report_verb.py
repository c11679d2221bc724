"""`penstock report` and `simulate --report`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.__main__ import run

ROOT = Path(__file__).parents[2]
SIMULATE = [
    "simulate", str(ROOT / "examples/azure_a100.toml"), "--trace", str(ROOT / "data/azure_2023_conv_200.csv"),
    "--limit", "60", "--speed", "8", "--slo-ttft", "1", "--slo-tpot", "0.05", "--set", "fleet.0.replicas=1",
]  # fmt: skip
pytest.importorskip("plotly", reason="the extra lab is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    args = [*SIMULATE, "--log", str(folder / "run.jsonl"), "--report", str(folder / "live.html")]
    assert run(args) == 0
    return folder


def test_a_log_becomes_a_page_json_and_traces(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
    files = {name: made / name for name in ("r.html", "r.perfetto.json", "r.otel.jsonl")}
    flags = zip(("--out", "--perfetto", "--otel"), files.values(), strict=True)
    args = ["report", str(made / "run.jsonl"), "--json", "-", "--title", "Sixty"]
    assert run([*args, *(str(part) for pair in flags for part in pair)]) == 0
    told = capsys.readouterr()
    page = json.loads(told.out)
    assert page["title"] == "Sixty" and page["banner"].startswith("SIMULATED")
    assert page["figures"]["run"]["figures"]["all"]["num_finished"] == 60
    assert page["figures"]["run"]["money"]["price"][0] == pytest.approx(3.67)
    assert all(path.stat().st_size > 1000 and str(path) in told.err for path in files.values())
    assert "<title>Sixty</title>" in files["r.html"].read_text()


def test_the_live_report_knows_the_trace_and_the_energy(made: Path) -> None:
    text = (made / "live.html").read_text()
    assert "azure_2023_conv_200.csv" in text and "energy of this run" in text
    assert "SIMULATED" in text and "a100-80g at $3.67/h" in text


def test_why_was_this_request_slow(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(made / "run.jsonl"), "--request", "azure_2023_conv_200-40"]) == 0
    told = capsys.readouterr().out
    assert (
        "Why did azure_2023_conv_200-40 take" in told
        and "decode" in told
        and "Latencies" not in told
    )


def test_mistakes_are_a_line_and_a_hint(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(tmp_path / "none.jsonl")]) == 2
    assert run(["report", str(made / "run.jsonl"), "--request", "nobody"]) == 2
    assert "no request 'nobody'" in capsys.readouterr().err
    for flag in ("--log", "--report"):  # before the run, not after it
        assert run([*SIMULATE, flag, str(made / "run.jsonl" / "x.html")]) == 2
        assert "cannot write the" in capsys.readouterr().err
    sweep = ["--sweep", "speed=1", "--report", str(tmp_path / "a.html"), "--out", str(tmp_path)]
    assert run([*SIMULATE, *sweep]) == 2
    assert "--report belongs to a single run" in capsys.readouterr().err


def test_the_folder_of_a_sweep_is_reported_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow", reason="the extra lab is not installed")
    from penstock.lab.sweep_files import write_parquet

    rows = [
        {"variant": "a", "seed": 0, "load_kind": "rate", "load": load, "offered_per_s": load, "attainment": kept,
         "goodput_per_s": load * kept, "cost_model": "roofline", "error": None}
        for load, kept in ((1.0, 1.0), (2.0, 0.5))
    ]  # fmt: skip
    write_parquet(rows, tmp_path / "results.parquet")
    assert run(["report", str(tmp_path), "--out", str(tmp_path / "sweep.html")]) == 0
    assert "Every point" in capsys.readouterr().out
    assert "Goodput against load" in (tmp_path / "sweep.html").read_text()
    assert run(["report", str(tmp_path), "--request", "x"]) == 2
    assert run(["report", str(tmp_path / "none.jsonl"), str(tmp_path)]) == 2
    assert "reported alone" in capsys.readouterr().err
    (tmp_path / "results.parquet").write_bytes(b"torn")
    assert run(["report", str(tmp_path)]) == 2
    assert "cannot be read as the results of a sweep" in capsys.readouterr().err


def test_a_log_with_nothing_in_it_is_reported(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = (made / "run.jsonl").read_text().splitlines()[0]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(head + "\n")
    logs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    for given in (logs[:1], logs):
        out, told = tmp_path / "new" / "page.html", tmp_path / "told" / "page.json"
        assert run(["report", *given, "--out", str(out), "--json", str(told)]) == 0
        assert "Nothing was asked for in this log" in capsys.readouterr().out
        assert out.is_file() and json.loads(told.read_text())["notes"]
