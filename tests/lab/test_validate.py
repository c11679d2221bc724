"""Validation: the rule, the marks, the slice, whose profile is taken; and once, slowly, the whole."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from pathlib import Path

import pytest

from penstock.__main__ import run as penstock
from penstock.core.errors import BadConfig, BadTrace, StepFailed
from penstock.cost.profile import Profile, SchedulerCost, describe_machine
from penstock.cost.serving import ServingCost
from penstock.lab.calibrate import Engine
from penstock.lab.drive import Driven
from penstock.lab.local_server import LocalServer, below
from penstock.lab.neighbours import Watch
from penstock.lab.repeats import answered_rate, is_noisy
from penstock.lab.slices import slice_of
from penstock.lab.validate import mismatch
from penstock.lab.verdict import FIGURES, Row, rows_of, table_of
from penstock.report.summary import Group, figures_of
from penstock.traffic import open_trace
from penstock.verbs.validate import default_trace, parse_loads

DATA = Path(__file__).parents[2] / "data"
AZURE = DATA / "azure_2023_conv_200.csv"


def row(predicted: float, *measured: float) -> Row:
    return Row(load=0.5, figure="TTFT mean", simulated=(predicted,), measured=measured)


@pytest.mark.parametrize(
    ("predicted", "measured", "has_passed"),
    [
        (1.049, (1.0, 1.0), True),  # 5 % is allowed however equal the repeats
        (1.051, (1.0, 1.0), False),
        (0.949, (1.0, 1.0), False),
        (1.14, (0.95, 1.05), True),  # a spread of 10 % allows 15 %
        (1.16, (0.95, 1.05), False),
        (1.0, (), False),  # nothing measured proves nothing
    ],
)
def test_a_figure_passes_within_5_percent_or_1_5_spreads(
    predicted: float, measured: tuple[float, ...], has_passed: bool
) -> None:
    assert row(predicted, *measured).has_passed is has_passed


def test_the_prediction_is_the_mean_of_the_simulations() -> None:
    one = Row(load=0.5, figure="E2E p99", simulated=(1.0, 3.0), measured=(2.0, 2.5, 1.5))
    assert one.predicted == 2.0 == one.mean and one.error == 0.0
    assert one.spread == 0.5 and one.allowed == 0.75
    told = table_of([one, row(1.5, 1.0)])
    assert "pass" in told[1] and "FAIL" in told[2] and "2000.00 ms" in told[1]


def test_rows_have_all_figures_of_a_run() -> None:
    group = Group(num_offered=2, num_finished=2, output_tokens=10)
    group.ttft_s.extend([1.0, 3.0])
    figures = figures_of({("default", "none"): group}, 5.0)
    rows = {one.figure: one for one in rows_of(0.3, [figures], [figures, figures])}
    assert rows.keys() == FIGURES.keys() and len(FIGURES) == 10
    assert rows["TTFT mean"].measured == (2.0, 2.0) and rows["TTFT p99"].predicted == 3.0
    assert rows["output tokens/s"].mean == 2.0
    assert rows["E2E p50"].mean is None and not rows["E2E p50"].has_passed


def fake_proc(folder: Path, busy: int, idle: int, own: int) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "stat").write_text(f"cpu  {busy} 0 0 {idle} 7 0 0 0 0 0\ncpu0 1 1 1 1\n")
    mine = folder / str(os.getpid())
    mine.mkdir(exist_ok=True)
    fields = ["S"] + ["0"] * 10 + [str(own), "0"] + ["0"] * 20
    (mine / "stat").write_text(f"{os.getpid()} (a name) with) {' '.join(fields)}\n")
    return folder


def test_neighbours_are_what_is_busy_and_not_ours(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, busy=1000, idle=5000, own=100)
    watch = Watch(list, proc)
    fake_proc(
        tmp_path, busy=1300, idle=5693, own=350
    )  # 1,000 ticks less 7 of iowait: 300 busy, 250 ours
    share = watch.share()
    assert share == pytest.approx(50 / 993)
    assert is_noisy(share, 0.05) and not is_noisy(share, 0.06) and not is_noisy(None, 0.0)
    assert Watch(list, tmp_path / "nothing").share() is None


def test_this_process_is_seen_at_work() -> None:
    watch = Watch(lambda: below(os.getpid()))
    sum(i * i for i in range(2_000_000))
    share = watch.share()
    assert share is None or 0 <= share <= 1


def counted(num: int, context: int) -> tuple[int, int, int]:
    """(kept, dropped, cut) of the file's first rows, by hand."""
    kept = dropped = cut = 0
    with AZURE.open() as file:
        for row in csv.DictReader(file):
            prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            if kept == num:
                break
            if prompt >= context:
                dropped += 1
                continue
            kept += 1
            cut += prompt + output > context
    return kept, dropped, cut


def test_a_slice_tells_what_it_left_out_and_cut() -> None:
    whole = slice_of(open_trace(AZURE, limit=50, max_tokens="trace", max_context=1 << 20))
    assert (whole.num_requests, whole.num_dropped, whole.num_cut) == (50, 0, 0)
    short = slice_of(open_trace(AZURE, limit=50, max_tokens="trace", max_context=500))
    assert (short.num_requests, short.num_dropped, short.num_cut) == counted(50, 500)
    assert short.num_dropped > 5 and short.num_cut > 0
    assert short.prompt_tokens + short.output_tokens <= 50 * 500
    twice = slice_of(open_trace(AZURE, limit=50, max_tokens="trace", max_context=500, speed=2))
    assert twice.rate_per_s == pytest.approx(2 * short.rate_per_s)
    with pytest.raises(BadTrace, match="every seed"):
        slice_of(open_trace(DATA.parent / "examples" / "workload_chat.toml", limit=5))
    with pytest.raises(BadTrace, match="too few arrivals"):
        slice_of(open_trace(AZURE, limit=1, max_context=500))


def test_saturation_is_the_rate_before_the_tail() -> None:
    driven = Driven()
    driven.groups["default", "none"].e2e_s.extend([1, 2, 3, 4, 5, 6, 7, 8, 20, 60])
    assert answered_rate(driven) == 1.0


def test_a_profile_speaks_for_its_machine_model_and_server() -> None:
    serving = ServingCost(
        request_s=0, request_token_s=0, request_other_s=0, reply_s=0, reply_token_s=0
    )
    profile = Profile(
        machine=describe_machine(), model="default", num_layers=4, steps={}, num_steps=1, mape=0, left_out=0,
        scheduler=SchedulerCost(
            fixed_s=0, per_running_s=0, per_waiting_s=0, policies="fcfs/full-fit/vllm-v1/recompute-last"
        ), serving=serving,
    )  # fmt: skip
    assert mismatch(profile, Engine()) is None
    assert "of the model" in (mismatch(profile, Engine(model="other")) or "")
    assert "of the policies" in (mismatch(profile, Engine(), "sglang") or "")
    elsewhere = dataclasses.replace(profile, machine={**describe_machine(), "processor": "abacus"})
    assert "another machine" in (mismatch(elsewhere, Engine()) or "")
    alone = dataclasses.replace(profile, serving=None)
    assert "what serving costs" in (mismatch(alone, Engine()) or "")


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(StepFailed, match="no-such-model") as told,
        LocalServer([str(tmp_path / "no-such-model")], tmp_path),
    ):
        pass
    assert "penstock serve" in (told.value.hint or "")


def test_flags_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_loads("0.5,0.9") == (0.5, 0.9)
    for wrong in ("", "a", "0.5,0.5", "-1", "0", "3"):
        with pytest.raises(BadConfig, match="--loads"):
            parse_loads(wrong)
    monkeypatch.delenv("PENSTOCK_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadConfig, match="no trace"):
        default_trace()
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "azure_2023_conv.csv").touch()
    monkeypatch.setenv("PENSTOCK_DATA", str(tmp_path))
    assert default_trace() == tmp_path / "traces" / "azure_2023_conv.csv"


@pytest.mark.slow
def test_this_machine_is_foretold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole, small: the figures are there and of the right size. How near they come is for a quiet machine."""
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "report.json", tmp_path / "validation.png"
    args = [
        "bench",
        "validate",
        "--trace",
        str(AZURE),
        "--quick",
        "--loads",
        "0.5",
        "--repeats",
        "2",
    ]
    args += [
        "--requests",
        "12",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--plot",
        str(picture),
        "--json",
    ]
    code = penstock(args)
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text()) and picture.stat().st_size > 10_000
    assert code == (0 if told["has_passed"] else 1)
    assert told["num_judged"] == 10 and len(told["runs"]) == 2
    assert told["profile"]["serving"]["num_answers"] >= 30
    assert told["profile_digest"] and told["slice"]["sha256"] and told["served"]["num_blocks"] > 0
    for one in told["rows"]:
        assert 0.2 < one["predicted"] / one["mean"] < 5, one
