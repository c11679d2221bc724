"""Points over a real Ray, on this machine: skipped where ray, the extra `cluster`, is not installed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from penstock.core.errors import BadConfig, MissingExtra, UpstreamFailed
from penstock.lab.points import Json, Point, run_points

ROOT = Path(__file__).parents[2]


def square(point: Point) -> Json:
    x = point.settings["x"]
    assert isinstance(x, int)
    if point.settings.get("fails") == x:
        raise BadConfig(f"{x} is no good")
    return {"y": x * x, "pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}


def deadly(point: Point, *, notes: Path) -> Json:
    """Kills its process at x = 1, the first `times` times."""
    times = point.settings["times"]
    assert isinstance(times, int)
    if point.settings["x"] == 1:
        tried = notes.read_text().count("x") if notes.exists() else 0
        notes.write_text("x" * (tried + 1))
        if tried < times:
            os.kill(os.getpid(), signal.SIGKILL)
    return square(point)


def points(num: int, **more: object) -> list[Point]:
    return [Point(settings={"x": x, **more}) for x in range(num)]


def values(results: list[object]) -> list[object]:
    return [None if each.value is None else each.value["y"] for each in results]  # type: ignore[attr-defined]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match="cluster"):
        run_points(points(1), square, ray="auto")


def test_a_cluster_that_is_not_there_is_told(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed (extra `cluster`)")
    with pytest.raises((UpstreamFailed, BadConfig), match="127.0.0.1:1"):
        run_points(points(1), square, ray="127.0.0.1:1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two cores of this machine, as a cluster that the tests share."""
    ray = pytest.importorskip("ray", reason="ray is not installed (extra `cluster`)")
    env = {"PYTHONPATH": str(ROOT)}
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env}
    )
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_points_run_on_the_cluster_and_are_kept(tmp_path: Path) -> None:
    store = tmp_path / "s.jsonl"
    found = run_points(points(6, fails=3), square, ray="auto", store=store)
    assert values(found) == [0, 1, 4, None, 16, 25]
    assert found[3].error == "3 is no good"
    pids = {each.value["pid"] for each in found if each.value is not None}
    assert os.getpid() not in pids
    again = run_points(points(6), square, processes=1, store=tmp_path / "t.jsonl")
    assert values(again)[:3] == values(found)[:3]
    assert [each.is_kept for each in run_points(points(6, fails=3), square, ray="auto", store=store)] == [
        True, True, True, False, True, True,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("times", [1, 2])
def test_a_killed_worker_is_tried_once_more(tmp_path: Path, times: int) -> None:
    found = run_points(
        points(3, times=times), partial(deadly, notes=tmp_path / "notes"), ray="auto"
    )
    assert values(found) == [0, 1 if times == 1 else None, 4]
    if times == 2:
        assert "twice" in str(found[1].error)
    assert (tmp_path / "notes").read_text() == "xx"
