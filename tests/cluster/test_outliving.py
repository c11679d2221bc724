"""Engines whose server is killed: the next one goes on with them, and nothing of the old one's requests is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.cluster.deployment import Deployment, Outlive, key_of
from penstock.cluster.doorway import find_like
from penstock.core.errors import BadConfig
from penstock.core.types import Output
from tests.cluster.outliving_server import SPEC, Controller, outlive
from tests.cluster.test_process import ROOT, is_running, until


async def test_the_next_server_goes_on_with_the_engine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.cluster.outliving_server", str(tmp_path)]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    assert killed.stdout is not None
    pid = int(await asyncio.to_thread(killed.stdout.readline))
    key = key_of(outlive(tmp_path))
    with pytest.raises(BadConfig, match="another server serves"):
        Controller(tmp_path)
    killed.kill()
    killed.wait()
    killed.stdout.close()
    assert is_running(pid)
    server = Controller(tmp_path)
    try:
        await server.start()
        assert server.pid == pid and key_of(outlive(tmp_path)) == key
        assert server.link.about == "ticking"

        def is_empty() -> bool:
            (report,) = server.fleet.reports()
            is_still = not report.num_running and not report.num_waiting
            return is_still and report.free_blocks == report.total_blocks

        await until(is_empty, 5.0)  # the old server's request had been written to
        heard: list[Output] = []
        await server.ask("b", 4, heard)  # of the same name
        assert [token for output in heard for token in output.ids] == [7] * 4
        assert heard[-1].num_cached == 96, "what the old server's request left in the cache"
        os.kill(pid, signal.SIGKILL)  # it is watched, though it is nobody's child here
        await until(lambda: server.pid != pid and all(r.is_alive for r in server.fleet.reports()))
        await server.ask("c", 3, [])
    finally:
        await server.stop()
    assert not is_running(server.pid)
    assert not (tmp_path / "d").exists()


async def test_an_engine_that_would_be_another_one_is_ended(tmp_path: Path) -> None:
    server = Controller(tmp_path, for_s=0.5)
    await server.start()
    pid, engine = server.pid, server.processes.engines[0]
    engine._keeper.stop()
    path = tmp_path / "d" / next((tmp_path / "d").glob("*.socket")).name
    same = await find_like(path, replace(SPEC, config="other words"))
    assert same is not None and same.pid == pid
    assert await find_like(path, replace(SPEC, num_blocks=77)) is None
    await until(lambda: not is_running(pid), 5.0)
    assert not path.exists()
    await server.stop()


async def test_an_engine_that_nobody_comes_for_ends(tmp_path: Path) -> None:
    server = Controller(tmp_path, for_s=0.3)
    await server.start()
    pid = server.pid
    server.processes.engines[0]._keeper.stop()
    server.link.lose("as if its server were gone")
    await asyncio.sleep(0.05)
    assert is_running(pid)
    await until(lambda: not is_running(pid), 5.0)
    await server.stop()


def test_a_folder_that_lets_others_in_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir(mode=0o755)
    (tmp_path / "d").chmod(0o755)
    with pytest.raises(BadConfig, match="not this user's alone"):
        Deployment(outlive(tmp_path))
    with pytest.raises(ValueError, match="letters"):
        Outlive(name="a/b")
    for name in (".", ".."):
        with pytest.raises(ValueError, match="neither"):
            Outlive(name=name)
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "linked").symlink_to(tmp_path / "mine")
    with pytest.raises(BadConfig, match="not this user's alone"):
        Deployment(Outlive(name="linked", folder=tmp_path))


def test_only_its_own_files_go_with_a_deployment(tmp_path: Path) -> None:
    told = outlive(tmp_path)
    deployment, folder = Deployment(told), tmp_path / "d"
    key_of(told)
    deployment.log("m-0").touch()
    (folder / "letters.txt").write_text("somebody's")
    deployment.close()
    assert [path.name for path in folder.iterdir()] == ["letters.txt"]


def test_a_key_that_was_not_written_is_made_and_half_a_key_is_none(tmp_path: Path) -> None:
    told = outlive(tmp_path)
    Deployment(told)
    path = tmp_path / "d" / "key"
    path.touch(mode=0o600)  # its server had no time, or no room, to write it
    key = key_of(told)
    assert len(key) == 16 and key_of(told) == key == path.read_bytes()
    path.write_bytes(b"short")
    with pytest.raises(BadConfig, match="holds no key"):
        key_of(told)
