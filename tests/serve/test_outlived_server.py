"""`penstock serve` is killed and started again: its engine goes on, with its weights, its cache and free blocks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest

from tests.serve.test_serve import Running, Stream, is_running, needs_model, serving, until


def answer(server: Running) -> dict[str, int]:
    """Usage of a whole answer to a long prompt."""
    asked = {"model": "default", "prompt": "def f():\n    pass\n" * 40, "max_tokens": 4}
    told = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).json()
    usage: dict[str, int] = told["usage"] | told["usage"]["prompt_tokens_details"]
    return usage


@pytest.mark.slow
@needs_model
def test_the_next_server_goes_on(tmp_path: Path) -> None:
    sets = ["--set", "serve.outlive.name=t", "--set", f"serve.outlive.folder={tmp_path}"]
    with serving(*sets) as first:
        (engine,) = first.engine_pids()
        assert answer(first)["cached_tokens"] == 0
        streams = [Stream(first, 1500) for _ in range(3)]
        for stream in streams:
            stream.first()
        os.kill(first.process.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(httpx.RemoteProtocolError):
                stream.rest()
    assert is_running(engine)
    with serving(*sets) as second:
        usage = answer(second)
        assert usage["cached_tokens"] > 0.9 * usage["prompt_tokens"]
        assert any("goes on" in line for line in second.lines), second.lines
        assert not second.engine_pids(), "an engine was started"

        def is_empty() -> bool:
            (told,) = httpx.get(f"{second.url}/internal/state").json()["replicas"]
            return not told["num_running"] and told["free_blocks"] == told["total_blocks"]

        until(is_empty)
        Stream(second, 20).rest()
        second.process.send_signal(signal.SIGTERM)
        assert second.end() == 0
    until(lambda: not is_running(engine))
    assert not list(tmp_path.iterdir())
