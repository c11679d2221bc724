"""`penstock serve --replicas 2` as a user meets it: two processes, and one of them killed while both answer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx

from tests.serve.test_serve import Stream, needs_model, serving, until


@needs_model
def test_one_of_two_replicas_is_killed(tmp_path: Path) -> None:
    """What the other one holds goes on, the door stays open, and the dead one's streams end with words or go on."""
    with serving("--replicas", "2", "--route", "round-robin", "--log", str(tmp_path)) as server:
        first, second = server.engine_pids()
        assert len({os.getpgid(pid) for pid in (first, second)}) == 2
        assert any(line.startswith("[default-1] ") for line in server.lines)
        streams = [Stream(server, 150) for _ in range(2)]
        for stream in streams:
            stream.first()
        os.kill(second, signal.SIGKILL)
        told = [stream.rest() for stream in streams]
        whole = [
            lines for lines in told if lines[-1] == "data: [DONE]" and '"usage":{' in lines[-2]
        ]
        assert len(whole) + sum("replica was lost" in "".join(lines) for lines in told) >= 2
        assert whole, "the other replica had nothing to do with it"
        assert server.health() == 200
        Stream(server, 8).rest()

        def states() -> list[tuple[bool, bool]]:
            replicas = httpx.get(f"{server.url}/internal/state").json()["replicas"]
            return [
                (each["is_alive"], each["free_blocks"] == each["total_blocks"])
                for each in replicas
                if each["is_alive"]
            ]

        until(lambda: states() and all(is_free for _, is_free in states()))
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
    assert {path.name for path in tmp_path.iterdir()} >= {
        "default-0.jsonl", "default-1.jsonl", "fleet-default.jsonl",
    }  # fmt: skip
