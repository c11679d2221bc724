"""Traces that are written are read back as what was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.core.errors import BadConfig, BadTrace
from penstock.core.types import Request
from penstock.traffic import Trace, open_trace
from penstock.traffic.written import write_trace
from tests.traffic.written_workloads import FIXED, LENGTHS, POISSON, opened

DATA = Path(__file__).parents[2] / "data"
TEXT = f"""
duration_s = 20
{POISSON}{LENGTHS}
prefix = {{number = 3, tokens = 300}}
failures = {{patience_s = 9.0, impatient = 0.5}}
tenants = {{number = 3}}
slo = {{ttft_s = 0.7, weight = 2.0}}
priority = 4
[[mix]]
name = "chat"
{POISSON}{FIXED}
sessions = {{turns = 3, think_s = 4}}
[[mix]]
name = "agents"
{POISSON}{FIXED}
programs = {{shape = "fan_out"}}
"""


def told(trace: Trace) -> list[object]:
    """All but names: those come from the file's."""
    found: list[object] = []
    first: float | None = None
    for at_s, item in trace:
        first = at_s if first is None else first
        alone = isinstance(item, Request)
        calls = [(item, (), 0.0, None)] if isinstance(item, Request) else [
            (call.request, call.after, call.wait_s, call.abandon_s) for call in item.calls
        ]  # fmt: skip
        seen = [
            (r.prompt.num_tokens, r.true_output, r.tenant, r.slo, r.priority, r.prompt.blocks(16), *rest)
            for r, *rest in calls
        ]  # fmt: skip
        found.append((round(at_s - first, 9), alone or item.kind, seen))
    return found


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_lines_keep_everything(tmp_path: Path, name: str) -> None:
    made = opened(tmp_path, TEXT)
    write_trace(made, tmp_path / name)
    back = open_trace(tmp_path / name)
    assert back.format == "flows"
    assert told(back) == told(made)
    assert back.meta.rows_kept == made.meta.rows_kept


def test_readers_that_know_mooncakes_keys_can_read_the_lines(tmp_path: Path) -> None:
    write_trace(opened(tmp_path, TEXT), tmp_path / "t.jsonl")
    records = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    for record in records:
        assert record["timestamp"] == pytest.approx(record["at_s"] * 1000)
        assert record["input_length"] >= 1 <= record["output_length"]
        assert len(record["hash_ids"]) * record["block_tokens"] <= record["input_length"]


def test_a_csv_keeps_instants_lengths_and_callers(tmp_path: Path) -> None:
    made = open_trace(DATA / "burstgpt_schema_120.csv")
    write_trace(made, tmp_path / "t.csv")
    back = open_trace(tmp_path / "t.csv")
    assert back.format == "csv"
    assert [(at, r.prompt.num_tokens, r.true_output, r.tenant) for at, r in back] == [  # type: ignore[union-attr]
        (at, r.prompt.num_tokens, r.true_output, r.tenant) for at, r in made  # type: ignore[union-attr]
    ]  # fmt: skip


def test_workflows_in_a_csv_come_at_nominal_instants(tmp_path: Path) -> None:
    text = f"num_requests = 3\n{POISSON}{FIXED}sessions = {{turns = 3, think_s = 4}}"
    write_trace(opened(tmp_path, text), tmp_path / "t.csv")
    ats = [at_s for at_s, _ in open_trace(tmp_path / "t.csv")]
    assert ats == pytest.approx([0.0, 4.4, 8.8])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"wait_s": -1}, "unreadable row"),
        ({"wait_s": float("inf")}, "unreadable row"),
        ({"start_s": float("nan")}, "a workflow without a finite time"),
        ({"kind": "dance"}, "unreadable row"),
        ({"after": [1]}, "a workflow out of order: call 0 cannot wait for call 1"),
        ({"output_length": 0}, "a workflow with an empty prompt or answer"),
    ],
)
def test_broken_workflows_are_dropped_with_a_reason(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    good: dict[str, object] = {
        "timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [], "block_tokens": 64,
        "flow": 1, "kind": "session", "start_s": 0.0,
    }  # fmt: skip
    lines = [{**good, **changes}, {**good, "flow": 2}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    trace = open_trace(tmp_path / "t.jsonl")
    assert len(list(trace)) == 1 and trace.meta.drops == {reason: 1}


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    trace = open_trace(DATA / "azure_2023_conv_200.csv")
    with pytest.raises(BadConfig, match="cannot tell what"):
        write_trace(trace, tmp_path / "t.parquet")
    with pytest.raises(BadConfig, match="cannot write"):
        write_trace(trace, DATA / "README.md" / "t.csv")
    write_trace(trace, tmp_path / "new" / "t.csv")
    assert (tmp_path / "new" / "t.csv").is_file()


def test_the_trace_itself_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens,tenant,session\n0,5,5,,\n")
    before = path.read_text()
    with pytest.raises(BadConfig, match="take the place"):
        write_trace(open_trace(path), path)
    assert path.read_text() == before


def test_a_trace_that_cannot_be_read_to_its_end_leaves_what_stood_there(tmp_path: Path) -> None:
    path, out = tmp_path / "mine.csv", tmp_path / "out.csv"
    out.write_text("kept\n")
    path.write_bytes(
        b"arrival_s,prompt_tokens,output_tokens,tenant,session\n" + b"0,5,5,,\n" * 3000 + b"\xe9\n"
    )
    with pytest.raises(BadTrace, match="past row"):
        write_trace(open_trace(path), out)
    assert out.read_text() == "kept\n" and {each.name for each in tmp_path.iterdir()} == {
        "mine.csv",
        "out.csv",
    }
