"""Points in parallel: each kept when done, none lost for another's sake, nothing done twice."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from penstock.core.errors import BadConfig, SchemaMismatch
from penstock.lab.points import Json, Point, Result, run_points, versions_here

ROOT = Path(__file__).parents[2]


def square(point: Point, *, notes: Path | None = None) -> Json:
    """What most tests let a point do; notes down that it was done."""
    x = point.settings["x"]
    assert isinstance(x, int)
    if notes is not None:
        with notes.open("a") as file:
            file.write(f"{x}\n")
    if point.settings.get("fails"):
        raise BadConfig(f"{x} is no good", hint="take another")
    if point.settings.get("has_a_bug"):
        return {"y": 1 / (x - x)}
    return {"y": x * x, "pid": os.getpid()} if point.settings.get("tells") else {"y": x * x}


def deadly(point: Point, *, notes: Path) -> Json:
    """Kills its process at x = 2, the first `times` times."""
    times = point.settings["times"]
    assert isinstance(times, int)
    if point.settings["x"] == 2:
        tried = notes.read_text().count("x") if notes.exists() else 0
        notes.write_text("x" * (tried + 1))
        if tried < times:
            os.kill(os.getpid(), signal.SIGKILL)
    return square(point)


def points(num: int, **more: object) -> list[Point]:
    return [Point(settings={"x": x, **more}) for x in range(num)]


def values(results: list[Result]) -> list[object]:
    return [None if each.value is None else each.value["y"] for each in results]


def test_a_key_is_the_digest_of_all_that_matters() -> None:
    one = Point(settings={"a": 1, "b": [2.0]}, inputs={"trace": "00"}, versions={"v": "1"})
    same = Point(settings={"b": [2.0], "a": 1}, inputs={"trace": "00"}, versions={"v": "1"})
    assert one.key == same.key
    others = [
        Point(settings={"a": 1, "b": [2.5]}, inputs={"trace": "00"}, versions={"v": "1"}),
        Point(settings={"a": 1, "b": [2.0]}, seed=1, inputs={"trace": "00"}, versions={"v": "1"}),
        Point(settings={"a": 1, "b": [2.0]}, inputs={"trace": "01"}, versions={"v": "1"}),
        Point(settings={"a": 1, "b": [2.0]}, inputs={"trace": "00"}, versions={"v": "2"}),
    ]
    assert len({one.key, *(each.key for each in others)}) == 5
    assert versions_here().keys() == {"penstock", "code", "numpy"}


def test_one_process_or_several_give_the_same_in_order(tmp_path: Path) -> None:
    given = points(7)
    alone = run_points(given, square, processes=1)
    beside = run_points(given, square, processes=2, store=tmp_path / "s.jsonl")
    kept = run_points(given, square, processes=2, store=tmp_path / "s.jsonl")
    assert values(alone) == values(beside) == values(kept) == [x * x for x in range(7)]
    assert [each.point for each in beside] == given
    assert all(each.is_kept for each in kept) and not any(each.is_kept for each in beside)


def test_work_is_done_by_as_many_processes_as_told() -> None:
    here = {each.value["pid"] for each in run_points(points(3, tells=True), square, processes=1)}  # type: ignore[index]
    assert here == {os.getpid()}
    there = {each.value["pid"] for each in run_points(points(6, tells=True), square, processes=2)}  # type: ignore[index]
    assert os.getpid() not in there and 1 <= len(there) <= 2


def test_equal_points_are_done_once(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    found = run_points(points(2) + points(2), partial(square, notes=notes), processes=1)
    assert values(found) == [0, 1, 0, 1] and notes.read_text() == "0\n1\n"


def test_a_run_goes_on_where_the_last_one_was_cut_off(tmp_path: Path) -> None:
    store, notes = tmp_path / "deep" / "s.jsonl", tmp_path / "notes"

    def stop_after_three(done: int, total: int, result: Result) -> None:
        if done == 3:
            raise KeyboardInterrupt

    work = partial(square, notes=notes)
    with pytest.raises(KeyboardInterrupt):
        run_points(points(8), work, store=store, processes=1, on_progress=stop_after_three)
    assert notes.read_text().split() == ["0", "1", "2"]
    with store.open("ab") as file:
        file.write(b'{"key": "torn')  # as if the power had failed while it wrote
    seen: list[tuple[int, int, bool]] = []
    found = run_points(
        points(8), work, store=store, processes=1,
        on_progress=lambda done, total, result: seen.append((done, total, result.is_kept)),
    )  # fmt: skip
    assert values(found) == [x * x for x in range(8)]
    assert notes.read_text().split() == [str(x) for x in range(8)]
    assert seen == [(i + 1, 8, i < 3) for i in range(8)]
    for line in store.read_text().splitlines():
        json.loads(line)


def test_a_point_that_raises_harms_no_other_and_is_tried_again(tmp_path: Path) -> None:
    store, notes = tmp_path / "s.jsonl", tmp_path / "notes"
    given = [
        *points(2),
        Point(settings={"x": 5, "fails": True}),
        Point(settings={"x": 6, "has_a_bug": True}),
    ]
    for _ in range(2):
        found = run_points(given, partial(square, notes=notes), store=store, processes=2)
        assert values(found) == [0, 1, None, None]
        assert found[2].error == "5 is no good\n  hint: take another" and not found[2].trace
        assert found[3].error == "ZeroDivisionError: division by zero"
        assert "in square" in found[3].trace
    assert sorted(notes.read_text().split()) == ["0", "1", "5", "5", "6", "6"]


@pytest.mark.parametrize("times", [1, 2])
def test_a_killed_worker_loses_its_point_alone_and_only_at_the_second_time(
    tmp_path: Path, times: int
) -> None:
    given = points(5, times=times)
    found = run_points(given, partial(deadly, notes=tmp_path / "notes"), processes=2)
    assert values(found) == [0, 1, 4 if times == 1 else None, 9, 16]
    if times == 2:
        assert "killed by SIGKILL" in str(found[2].error) and "twice" in str(found[2].error)
    assert (tmp_path / "notes").read_text() == "xx"


def test_values_that_are_no_json_are_an_error_of_the_point() -> None:
    found = run_points(points(1), lambda point: {"y": float("nan")}, processes=1)
    assert found[0].value is None and "JSON" in str(found[0].error)


def test_a_store_is_refused_when_it_is_none_is_newer_or_in_use(tmp_path: Path) -> None:
    store = tmp_path / "s.jsonl"
    store.write_text("a,b\n1,2\n")
    with pytest.raises(BadConfig, match="holds no results"):
        run_points(points(1), square, store=store, processes=1)
    assert store.read_text() == "a,b\n1,2\n"
    store.write_text('{"schema": 99, "kind": "points"}\n')
    with pytest.raises(SchemaMismatch, match="schema version 99"):
        run_points(points(1), square, store=store, processes=1)
    store.write_text("")
    with store.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BadConfig, match="another run"):
            run_points(points(1), square, store=store, processes=1)
    with pytest.raises(BadConfig, match="processes must be"):
        run_points(points(1), square, processes=0)


SCRIPT = """
import signal, sys, time
from pathlib import Path
from penstock.lab.points import Point, run_points

def slow(point):
    time.sleep(point.settings["s"])
    return {"is_spared": signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])}

def main():
    given = [Point(settings={"x": x, "s": 0.0 if x < 2 else 60.0}) for x in range(6)]
    run_points(given, slow, store=Path(sys.argv[1]), processes=2)

%s
"""


def alive_in_group(group: int) -> list[str]:
    """Processes that are neither gone nor zombies that nobody has reaped yet."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            told = path.read_text()
        except OSError:
            continue  # it ended meanwhile
        state, _, of = told.rpartition(") ")[2].split()[:3]
        if int(of) == group and state != "Z":
            found.append(told)
    return found


def test_ctrl_c_leaves_no_process_and_keeps_what_is_done(tmp_path: Path) -> None:
    script, store = tmp_path / "run.py", tmp_path / "s.jsonl"
    script.write_text(SCRIPT % 'if __name__ == "__main__":\n    main()')
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(store)]
    process = subprocess.Popen(
        command, env=env, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (
            not store.exists() or store.read_text().count("\n") < 3
        ):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: everybody gets it
        told = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert told.count("KeyboardInterrupt") == told.count("Traceback") == 1, told
    assert "Process Spawn" not in told  # how a worker would begin its own
    while alive_in_group(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive_in_group(process.pid)
    kept = [json.loads(line) for line in store.read_text().splitlines()[1:]]
    assert [each["value"] for each in kept] == [{"is_spared": True}] * 2


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT % "main()")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(tmp_path / "s.jsonl")]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "if __name__ ==" in ended.stderr.splitlines()[-1]
