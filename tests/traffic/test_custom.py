"""CSV files of one's own: columns by name, times in any unit, mistakes that name what the file has."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.errors import BadConfig, BadTrace
from penstock.traffic import Columns, open_trace, parse_columns

NAMES = "arrival=ts,prompt=in_tokens,output=out_tokens"


def instants(
    folder: Path, rows: list[str], columns: str = NAMES, head: str = "ts,in_tokens,out_tokens"
) -> list[float]:
    path = folder / "mine.csv"
    path.write_text("\n".join([head, *rows]) + "\n")
    return [at_s for at_s, _ in open_trace(path, columns=parse_columns(columns))]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("0", "1.5"),
        ("100.25", "101.75"),
        ("1700000000.0", "1700000001.5"),  # Unix seconds
        ("1700000000000", "1700000001500"),  # ms
        ("1700000000000000", "1700000001500000"),  # us
        ("1700000000000000000", "1700000001500000000"),  # ns
        ("2024-02-29T23:59:59", "2024-03-01T00:00:00.5"),
        ("2024-02-29 23:59:59.000Z", "2024-03-01 02:00:00.5000000+02:00"),
    ],
)
def test_times_are_recognised(tmp_path: Path, first: str, second: str) -> None:
    found = instants(tmp_path, [f"{first},5,5", f"{second},5,5"])
    assert found == pytest.approx([0.0, 1.5], abs=1e-6)


@pytest.mark.parametrize("column", ["start_ms", "latency(ms)", "ms"])
def test_a_unit_in_the_name_of_the_column(tmp_path: Path, column: str) -> None:
    rows = ["0,5,5", "1500,5,5"]
    columns = f"arrival={column},prompt=in,output=out"
    assert instants(tmp_path, rows, columns, f"{column},in,out") == [0.0, 1.5]


def test_a_unit_that_is_stated(tmp_path: Path) -> None:
    rows = ["0,5,5", "1500,5,5"]
    assert instants(tmp_path, rows, NAMES.replace("=ts", "=ts:ms")) == [0.0, 1.5]
    assert parse_columns("arrival=a:b,prompt=p,output=o").arrival == "a:b"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.datetimes(datetime(1990, 1, 1), datetime(2060, 1, 1)),
    st.lists(st.integers(0, 10**10), min_size=1, max_size=5),
)
def test_iso_times_agree_with_datetime(tmp_path: Path, first: datetime, gaps_us: list[int]) -> None:
    moments = [first.replace(tzinfo=UTC)]
    for gap in gaps_us:
        moments.append(moments[-1] + timedelta(microseconds=gap))
    found = instants(tmp_path, [f"{each.isoformat()},5,5" for each in moments])
    assert found == pytest.approx(
        [(each - moments[0]).total_seconds() for each in moments], abs=2e-6
    )


def test_tenants_sessions_and_what_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(
        "who;chat;ts;in_tokens;out_tokens;note\n"
        "ann;s1;0;10;20;x\n;;1;12.0;3;\nbob;s1;2;0;3;\nbob;s2;3;4.5;3;\nbob;s2;later;4;3;\n"
    )
    trace = open_trace(path, columns=parse_columns(f"{NAMES},tenant=who,session=chat"))
    found = [(r.tenant, r.program, r.prompt.num_tokens, r.true_output) for _, r in trace]  # type: ignore[union-attr]
    assert found == [("ann", "s1", 10, 20), ("default", None, 12, 3)]
    assert trace.meta.drops == {"no prompt tokens": 1, "unreadable row": 2}
    assert trace.meta.format == "csv"


def test_a_file_without_times_takes_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("in,out\n" + "5,6\n" * 50)
    columns = Columns(prompt="in", output="out")
    assert len(list(open_trace(path, columns=columns, rate_per_s=2.0))) == 50
    with pytest.raises(BadTrace, match="no arrival times"):
        list(open_trace(path, columns=columns))


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("time,in_toks,out_tokens\n1,2,3\n")
    with pytest.raises(BadTrace) as told:
        open_trace(path, columns=parse_columns("arrival=time,prompt=in_tokens,output=out_tokens"))
    assert "no column 'in_tokens'; did you mean 'in_toks'?" in told.value.message
    assert "It has 'time', 'in_toks', 'out_tokens'" in told.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arrival=ts,prompt=p", "which column is 'output'"),
        ("prompt", "does not say NAME=COLUMN"),
        ("promt=p,output=o", "did you mean 'prompt'"),
        ("size=p,prompt=p,output=o", "unknown name 'size'"),
    ],
)
def test_flags_that_say_too_little(text: str, said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        parse_columns(text)


def test_nothing_readable_is_told_with_the_first_row(tmp_path: Path) -> None:
    with pytest.raises(BadTrace, match="first bad row: 'soon,5,5'"):
        instants(tmp_path, ["soon,5,5"])


BROKEN = {
    "latin.csv": b"ts,in_tokens,out_tokens,caf\xe9\n1,5,5,x\n",
    "long.csv": b"ts,in_tokens,out_tokens\n1,5,5\n2," + b"5" * 200_000 + b",5\n",
    "packed.csv.gz": gzip.compress(b"ts,in_tokens,out_tokens\n" + b"1,5,5\n" * 5000)[:20]
    + b"\xff" * 60,
    "empty.csv": b"",
    "head.csv": b"ts,in_tokens,out_tokens\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_told_and_not_thrown(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with pytest.raises(BadTrace, match=name) as caught:
        list(open_trace(path, columns=parse_columns(NAMES)))
    assert "None" not in str(caught.value)


def test_rows_without_an_instant_or_of_no_possible_size_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    rows = ["", "ts,in_tokens,out_tokens", "nan,5,5", "1,5,5", "inf,5,5", "2,1e300,5", "3,5,5"]
    path.write_text("\n".join(rows) + "\n")
    trace = open_trace(path, columns=parse_columns(NAMES))
    assert [at_s for at_s, _ in trace] == [0.0, 2.0]
    assert trace.meta.drops == {"no finite time": 2, "more tokens than there can be": 1}


def test_blank_lines_before_the_head(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("\n\nTIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,5,5\n")
    assert len(list(open_trace(path))) == 1
