"""`penstock serve` as a user meets it: a process, a port, streams, signals and a crash of the engine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from penstock.engine.folder import DEFAULT_FOLDER

ROOT = Path(__file__).parents[2]
needs_model = pytest.mark.skipif(
    not (DEFAULT_FOLDER / "model.safetensors").exists(), reason="the default model is not there"
)


def penstock(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "penstock", *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


class Running:
    """A server that is up; `lines` is what it said on stderr so far."""

    def __init__(self, *args: str) -> None:
        self.process = penstock("serve", "--port", "0", "--device", "cpu", *args)
        assert self.process.stdout is not None
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ready_line = self.process.stdout.readline()
        found = re.search(r"http://[\d.]+:\d+", self.ready_line)
        assert found, f"{self.ready_line!r} {self.lines}"
        self.url = found[0]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def engine_pids(self) -> list[int]:
        told = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "penstock.cluster.worker"],
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(each) for each in told.stdout.split()]

    def health(self) -> int:
        return httpx.get(f"{self.url}/health").status_code

    def end(self) -> int:
        return self.process.wait(timeout=30)


@contextlib.contextmanager
def serving(*args: str) -> Iterator[Running]:
    server = Running(*args)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def body(tokens: int) -> dict[str, object]:
    return {
        "model": "default",
        "prompt": "import os\n\ndef ",
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class Stream:
    """A streamed completion, read step by step."""

    def __init__(self, server: Running, tokens: int) -> None:
        self.client = httpx.Client(timeout=60)
        self._context = self.client.stream(
            "POST", f"{server.url}/v1/completions", json=body(tokens)
        )
        self.response = self._context.__enter__()
        assert self.response.status_code == 200
        self.lines = (line for line in self.response.iter_lines() if line.startswith("data: "))

    def first(self) -> str:
        return next(self.lines)

    def rest(self) -> list[str]:
        found = list(self.lines)
        self._context.__exit__(None, None, None)
        self.client.close()
        return found


def until(condition: object, timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@needs_model
def test_a_life_of_a_server(tmp_path: Path) -> None:
    """Ready line, stream, engine killed and back, drained by SIGTERM while a stream runs."""
    with serving("--log", str(tmp_path)) as server:
        assert "ready at" in server.ready_line and "default on cpu" in server.ready_line
        assert server.health() == 200
        stream = Stream(server, 24)
        told = [stream.first(), *stream.rest()]
        assert told[-1] == "data: [DONE]"
        assert json.loads(told[-2][6:])["usage"]["completion_tokens"] == 24

        (engine,) = server.engine_pids()
        stream = Stream(server, 1500)
        stream.first()
        os.kill(engine, signal.SIGKILL)
        assert "error" in "".join(stream.rest())
        assert server.health() == 503
        until(lambda: server.health() == 200)
        assert server.engine_pids() != [engine]

        stream = Stream(server, 1200)
        stream.first()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.health() == 503)
        refused = httpx.post(f"{server.url}/v1/completions", json=body(5))
        assert refused.status_code == 503 and float(refused.headers["retry-after"]) > 0
        told = stream.rest()
        assert told[-1] == "data: [DONE]"
        assert json.loads(told[-2][6:])["usage"]["completion_tokens"] == 1200
        engines = server.engine_pids()
        assert server.end() == 0
        assert not any(map(is_running, engines))
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {
        "default-0.jsonl",
        "fleet-default.jsonl",
    }


@needs_model
@pytest.mark.slow
def test_a_second_signal_stops_at_once() -> None:
    with serving() as server:
        stream = Stream(server, 1500)
        stream.first()
        engines = server.engine_pids()
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)  # the same one, passed on by a parent
        until(lambda: any("draining" in line for line in server.lines))
        time.sleep(0.5)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        with contextlib.suppress(httpx.HTTPError):
            stream.rest()
        assert server.end() == 1
        assert not any(map(is_running, engines))


@needs_model
@pytest.mark.slow
def test_the_drain_timeout_ends_what_does_not_end() -> None:
    with serving("--drain-timeout", "0.5") as server:
        stream = Stream(server, 1500)
        stream.first()
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(httpx.HTTPError):
            stream.rest()
        assert server.end() == 1


def failing(*args: str) -> str:
    """stderr of a command that must fail with 2."""
    process = penstock(*args)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    return err


def test_a_port_in_use_is_told_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        err = failing("serve", "--port", port)
    assert f"127.0.0.1:{port}: Address already in use\n" in err and "--port" in err
    assert "starting" not in err


def test_logs_that_cannot_be_written_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    err = failing("serve", "--port", "0", "--log", str(tmp_path / "file" / "logs"))
    assert str(tmp_path / "file" / "logs") in err and "Not a directory" in err
    assert "looking for" not in err


def test_a_folder_that_is_no_model_is_told(tmp_path: Path) -> None:
    err = failing("serve", str(tmp_path), "--port", "0")
    assert f"{tmp_path / 'config.json'} is missing" in err and "starting" not in err


def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    err = failing("serve", str(tmp_path / "nowhere"), "--port", "0")
    assert "nowhere" in err and "hint:" in err


@needs_model
@pytest.mark.slow
def test_an_engine_that_cannot_start_ends_the_server_with_its_reason() -> None:
    err = failing("serve", "--port", "0", "--device", "cuda:77")
    assert "penstock: there is no CUDA device" in err or "cuda:77" in err
    assert "hint:" in err
