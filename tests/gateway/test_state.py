"""`penstock top`: what the gateway tells, what a frame shows, and the verb over a real socket."""

from __future__ import annotations

import io
import json

import httpx
import msgspec
import pytest
from rich.console import Console

from penstock.__main__ import run
from penstock.core.events import Ended, Left, Scaled, Steered
from penstock.core.moving import Migrated
from penstock.core.types import BroughtReport, Report
from penstock.gateway.app import create_app
from penstock.gateway.config import GatewayConfig
from penstock.gateway.text import TextModel
from penstock.report.log import Memory
from penstock.report.recent import MOST, Recent
from penstock.report.top import frame
from penstock.sim.loop import run as run_virtual
from tests.gateway.conftest import Start
from tests.gateway.scripted import Scripted


class Told(Scripted):
    """One busy replica, one that is silent, one that is dead."""

    def reports(self) -> list[Report]:
        busy = Report(
            replica="tiny-0", at=0.0, role="prefill", num_running=3, num_waiting=2, waiting_tokens=700,
            prefill_tokens=324, free_blocks=25, total_blocks=100, step_s=0.0125, moving_out=1,
            brought=(BroughtReport("host", 1200, 9600, 0.5, 0), BroughtReport("peer", 40, 320, 0.25, 3)),
        )  # fmt: skip
        silent = Report(replica="tiny-1", at=0.0, role="decode", is_suspect=True)
        return [busy, silent, Report(replica="tiny-2", at=0.0, is_alive=False)]


def happened() -> list[object]:
    moved = Steered(
        at=1.0, who="fleet-tiny", cause="tick", about="", moving=(),
        moves=(("req-1", "tiny-0", "tiny-1", "live"),), why="tiny-0 is 1.8 times as loaded",
    )  # fmt: skip
    there = Migrated(
        at=1.5, who="fleet-tiny", request="req-1", source="tiny-0", target="tiny-1", mode="live",
        outcome="committed", stages=2, num_blocks=40, num_bytes=1 << 20, pause_s=0.0021,
    )  # fmt: skip
    grown = Scaled(at=2.0, who="fleet-tiny", starting=(), add=(("decode", 1),), why="queue is long")
    return [moved, there, grown, Left(at=3.0, who="fleet-tiny", replica="tiny-9")]


def snapshot_of(service: Scripted, text: TextModel) -> dict[str, object]:
    app = create_app(service, dict.fromkeys(service.names, text), GatewayConfig())
    meter = app.meter.of("tiny")
    meter.generated, app.state.recent = 5000, happened  # type: ignore[assignment]
    meter.looked_up_tokens.inc(200)
    meter.cached_tokens.inc(50)
    meter.in_flight.set(5)

    async def ask() -> dict[str, object]:
        return app.state.snapshot()

    return run_virtual(ask(), start_at=4.0)


def shown(*snapshots: dict[str, object]) -> str:
    out = io.StringIO()
    Console(file=out, width=150).print(frame(*snapshots, url="http://x"))
    return out.getvalue()


def test_a_frame_shows_replicas_rates_and_reasons(service: Scripted, text: TextModel) -> None:
    told = snapshot_of(Told(service.script), text)
    before = json.loads(json.dumps(told))
    before["at"] = told["at"] - 2.0  # type: ignore[operator]
    before["models"][0]["generated_tokens"] = 4000
    lines = [line.rstrip() for line in shown(told, before).splitlines()]
    assert "2 of 3 replicas alive" in lines[0]
    assert lines[2].split() == ["tiny", "5", "500", "0", "5,000", "25%"]
    assert lines[4].split() == [
        "tiny-0", "prefill", "alive", "3", "2", "1,024", "75%", "1,200", "host,", "40", "peer",
        "0", "in", "1", "out", "12.5", "4.0",
    ]  # fmt: skip
    assert lines[5].split()[:3] == ["tiny-1", "decode", "silent"]
    assert lines[6].split()[:3] == ["tiny-2", "any", "dead"]
    assert lines[8] == "1 s  fleet-tiny: tiny-9 left"
    assert lines[9] == "2 s  fleet-tiny: +1 decode - queue is long"
    assert lines[10] == (
        "2 s  fleet-tiny: req-1: tiny-0 -> tiny-1 (live) committed, 40 blocks in 2 stages, paused 2.1 ms"
    )
    assert lines[11].endswith("req-1: tiny-0 -> tiny-1 (live) - tiny-0 is 1.8 times as loaded")


def test_loans_and_devices_are_told(service: Scripted, text: TextModel) -> None:
    told = snapshot_of(service, text)
    lent = Steered(
        at=1.0, who="f", cause="tick", about="", moving=(), moves=(), loans=(("req-1", "a", "b", 32),)
    )  # fmt: skip
    grown = Scaled(at=2.0, who="f", starting=(), devices=(("a", 3),))
    told["recent"] = [{**msgspec.to_builtins(each), "ago_s": 1.0} for each in (lent, grown)]
    lines = [line.strip() for line in shown(told).splitlines()]
    assert "1 s  f: req-1: b keeps 32 blocks for a" in lines
    assert "1 s  f: a gets 3 devices" in lines


def test_without_an_earlier_look_there_are_no_rates(service: Scripted, text: TextModel) -> None:
    line = shown(snapshot_of(service, text)).splitlines()[2]
    assert line.split() == ["tiny", "5", "-", "-", "5,000", "25%"]


def test_only_what_people_look_for_is_kept() -> None:
    recent, log = Recent(), Memory()
    beside = recent.beside(log)
    ended = Ended(at=0.0, who="f", request="a", replica="r")
    for number in range(2 * MOST):
        beside.emit(Left(at=float(number), who="f", replica=f"r{number}"))
        beside.emit(ended)
    assert len(log.events) == 4 * MOST
    assert [event.at for event in recent.events()] == [float(at) for at in range(MOST, 2 * MOST)]  # type: ignore[union-attr]


def test_the_verb_asks_a_real_server(
    start: Start, service: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    url = start(Told(service.script), api_keys={"s3cret": "me"})
    assert httpx.get(f"{url}/internal/state").status_code == 401
    assert run(["top", url, "--json"]) == 2
    assert "--api-key" in capsys.readouterr().err
    assert run(["top", url, "--json", "--api-key", "s3cret"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["replica"] for each in told["replicas"]] == ["tiny-0", "tiny-1", "tiny-2"]
    assert run(["top", url, "--once", "--every", "0.05", "--api-key", "s3cret"]) == 0
    assert "2 of 3 replicas alive" in capsys.readouterr().out


def test_what_cannot_be_watched_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "http://127.0.0.1:1", "--once"]) == 2
    assert "penstock serve" in capsys.readouterr().err
    assert run(["top", "--every", "0"]) == 2


def test_replicas_stand_by_name_and_long_names_keep_their_ends(
    service: Scripted, text: TextModel
) -> None:
    told = snapshot_of(Told(service.script), text)
    replicas = told["replicas"]
    assert isinstance(replicas, list)
    replicas[0]["replica"], replicas[1]["replica"] = "y-1", f"a/{'x' * 60}.gguf-0"
    lines = shown(told).splitlines()
    names = [line.split()[0] for line in lines[4:7]]
    assert names == [f"…{'x' * 20}.gguf-0", "tiny-2", "y-1"]


def test_what_was_fetched_is_told_by_place(service: Scripted, text: TextModel) -> None:
    told = Told(service.script)
    app = create_app(told, dict.fromkeys(told.names, text), GatewayConfig())
    lines = app.meter.text().decode().splitlines()
    for name, number in (("blocks", 40.0), ("bytes", 320.0), ("seconds", 0.25), ("failures", 3.0)):
        assert f'penstock:kv_fetch_{name}_total{{engine="tiny-0",place="peer"}} {number}' in lines
    assert not [line for line in lines if "kv_fetch" in line and "tiny-1" in line]


def test_in_a_narrow_terminal_no_number_is_cut_and_empty_columns_are_left_out(
    service: Scripted, text: TextModel
) -> None:
    told = snapshot_of(service, text)
    names = [f"/models/{'x' * 60}.gguf-{number}" for number in range(2)]
    told["replicas"] = [
        {**msgspec.to_builtins(Report(replica=name, at=0.0, num_waiting=12_345)), "age_s": 0.7}
        for name in names
    ]
    out = io.StringIO()
    Console(file=out, width=80).print(frame(told, url="http://x"))
    head, first, second = [line.split() for line in out.getvalue().splitlines()[3:6]]
    assert head == ["replica", "state", "run", "wait", "prefill", "age", "s"]
    assert [line[1:] for line in (first, second)] == [["alive", "0", "12345", "0", "0.7"]] * 2
    assert [line[0][-7:] for line in (first, second)] == [".gguf-0", ".gguf-1"]


def test_a_model_that_nobody_has_called_is_there(service: Scripted, text: TextModel) -> None:
    app = create_app(service, dict.fromkeys(service.names, text), GatewayConfig())

    async def ask() -> dict[str, object]:
        return app.state.snapshot()

    told = run_virtual(ask())
    assert shown(told).splitlines()[2].split() == ["tiny", "0", "-", "-", "0", "-"]
