"""Logs: written and read back alike, named by a digest, and never worth failing for."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import BadTrace, SchemaMismatch
from penstock.core.events import Arrived, Completed, Event, Header
from penstock.core.types import Report, Slo
from penstock.report.log import Digest, Fanout, LogWriter, Memory, Null, log_paths, read_log

HEADER = Header(version="0", who="replica-0", config='[a]\nb = "\u00e9"', seed=3, loop_at=0.1 + 0.2)


def arrived(number: int) -> Arrived:
    return Arrived(
        at=number / 3,
        who="replica-0",
        request=f"r{number}",
        seq=number,
        model="m",
        num_prompt=3,
        max_tokens=5,
        n=1,
        tenant="t",
        priority=0,
        slo=Slo(ttft_s=0.1),
        hashes=("ab", "cd"),
    )


def value_of(hint: Any, fill: dict[Any, Any]) -> Any:
    """Something of that type: of a union the first that is known, of tuples one of each or two of the same."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in fill:
        return fill[hint]
    if origin is typing.Literal:
        return args[0]
    if origin is tuple:
        kinds = (args[0],) * 2 if args[-1] is ... else args
        return tuple(value_of(kind, fill) for kind in kinds)
    return next(value_of(arg, fill) for arg in args if arg in fill or typing.get_origin(arg))


def one_of_each() -> list[Event]:
    """An event of every kind, its fields filled by type: a kind added later is tested without a line here."""
    fill = {int: 3, float: 1 / 3, str: "x", bool: True, Slo: Slo(tpot_s=0.05)}
    fill[Report] = Report(replica="replica-0", at=0.5, role="decode")
    found: list[Event] = []
    for cls in typing.get_args(Event):
        hints = typing.get_type_hints(cls, vars(sys.modules[cls.__module__]))
        values = {}
        for name in cls.__struct_fields__:
            if name in ("kind", "schema"):
                continue
            values[name] = value_of(hints[name], fill)
        found.append(cls(**values))
    assert isinstance(found[0], Header)
    return found


def test_every_kind_comes_back_equal(tmp_path):
    written = one_of_each()
    log = LogWriter(tmp_path / "deep" / "a.jsonl")
    for event in written:
        log.emit(event)
    log.close()
    reader = read_log(tmp_path / "deep" / "a.jsonl")
    assert list(reader) == written == list(reader)
    assert reader.header() == written[0]
    assert not reader.is_truncated and not reader.unknown
    for line in (tmp_path / "deep" / "a.jsonl").read_text().splitlines():
        assert line.startswith('{"kind":"')


def test_digests_are_equal_for_equal_runs_only():
    def digest(*told: Event) -> str:
        found = Digest()
        memory = Memory()
        for event in told:
            Fanout(found, memory, Null()).emit(event)
        assert memory.events == list(told) and found.num_events == len(told)
        return found.hexdigest()

    runs = [
        [HEADER, arrived(1), arrived(2)],
        [HEADER, arrived(2), arrived(1)],
        [HEADER, arrived(1)],
    ]
    assert len({digest(*told) for told in runs}) == 3
    later = Header(
        version="0", who="replica-0", config=HEADER.config, seed=3, loop_at=0.1 + 0.2, wall_at=9.0
    )
    assert digest(HEADER, arrived(1)) == digest(later, arrived(1))


def test_a_second_log_of_that_name_keeps_the_first(tmp_path):
    for number in range(3):
        log = LogWriter(tmp_path / "a.jsonl")
        log.emit(HEADER)
        log.emit(arrived(number))
        log.close()
        log.emit(arrived(9))  # after the end: ignored
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.1", "a.jsonl.2"]
    assert list(read_log(tmp_path / "a.jsonl"))[1] == arrived(2)
    assert list(read_log(tmp_path / "a.jsonl.1"))[1] == arrived(0)
    assert [path.name for path in log_paths(tmp_path)] == ["a.jsonl", "a.jsonl.1", "a.jsonl.2"]


async def test_lines_are_written_when_nothing_happens(tmp_path):
    log = LogWriter(tmp_path / "a.jsonl", flush_after_s=0.01)
    log.emit(HEADER)
    log.emit(arrived(1))
    assert len(list(read_log(tmp_path / "a.jsonl"))) == 1
    await asyncio.sleep(0.1)
    assert len(list(read_log(tmp_path / "a.jsonl"))) == 2


CRASH = """
import os, signal, sys
from tests.report.test_log import HEADER, arrived
from penstock.report.log import LogWriter
log = LogWriter(sys.argv[1])
log.emit(HEADER)
for number in range(5000):
    log.emit(arrived(number))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_its_last_lines_only(tmp_path):
    path = tmp_path / "a.jsonl"
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", CRASH, path], cwd=root, check=False)
    assert ended.returncode == -signal.SIGKILL
    found = list(read_log(path))
    assert found[0] == HEADER
    assert found[1:] == [arrived(number) for number in range(len(found) - 1)]
    lost = 5000 - (len(found) - 1)
    assert 0 < lost * 200 < 2 * (1 << 16)


def test_a_cut_last_line_is_left_out_and_reported(tmp_path):
    path = tmp_path / "a.jsonl"
    log = LogWriter(path)
    for event in (HEADER, arrived(1), arrived(2)):
        log.emit(event)
    log.close()
    path.write_bytes(path.read_bytes()[:-7])
    reader = read_log(path)
    assert list(reader) == [HEADER, arrived(1)] and reader.is_truncated


def test_a_full_disk_ends_the_log_and_not_the_service(tmp_path, monkeypatch, caplog):
    log = LogWriter(tmp_path / "a.jsonl")
    log.emit(HEADER)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with caplog.at_level(logging.WARNING):
        for number in range(2000):
            log.emit(arrived(number))
        log.close()
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    monkeypatch.undo()
    assert list(read_log(tmp_path / "a.jsonl")) == [HEADER]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_disk(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    log = LogWriter(path)
    log.emit(HEADER)
    os.dup2(os.open("/dev/full", os.O_WRONLY), log._file)
    log.emit(arrived(1))
    log.close()
    assert "No space left" in caplog.text


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    log = LogWriter(tmp_path / "file" / "a.jsonl")
    log.emit(HEADER)
    log.emit(arrived(1))
    log.close()
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("", BadTrace, "is empty"),
        ("hello\n", BadTrace, "is no Penstock log"),
        ('{"kind":"arrived"}\n', BadTrace, "is no Penstock log"),
        ('{"kind":"header","schema":2}\n', SchemaMismatch, "schema version 2"),
        ('{"kind":"header"}\n', SchemaMismatch, "does not state"),
        ('{"kind":"header","schema":1}\n{"kind":"arrived","at":"x"}\n', BadTrace, "line 2"),
        ('{"kind":"header","schema":1}\nxyz\n', BadTrace, "line 2"),
    ],
)
def test_what_is_no_log_is_said(tmp_path, text, error, said):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(error, match=said):
        list(read_log(path))


def test_newer_kinds_are_left_out_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"kind":"header","schema":1}\n{"kind":"sung","at":1}\n')
    reader = read_log(path)
    assert len(list(reader)) == 1 and reader.unknown == {"sung": 1}


def test_missing_logs_are_said(tmp_path):
    with pytest.raises(BadTrace, match="cannot open"):
        list(read_log(tmp_path / "none"))
    with pytest.raises(BadTrace, match="no logs"):
        log_paths(tmp_path)


def test_completed_events_keep_their_tuples(tmp_path):
    event = Completed(
        at=1.5, who="w", plan=7, steps_run=2, ends=(1.0, 1.5), outputs=((0, 2, False, ("ab",)),)
    )
    log = LogWriter(tmp_path / "a.jsonl")
    log.emit(HEADER)
    log.emit(event)
    log.close()
    assert list(read_log(tmp_path / "a.jsonl"))[1] == event
