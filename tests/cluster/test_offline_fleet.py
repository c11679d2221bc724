"""Offline requests that writers pull from where their prompts were computed, in virtual time: the online promise holds,
every word is the one that was to be said, and it is replayed.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from penstock.assemble import load_config
from penstock.core.events import Finished, Stepped
from penstock.core.moving import Migrated
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling, Slo
from penstock.lab.replay import replay_log
from penstock.lab.simulate import simulate
from penstock.policy import find
from penstock.report.log import LogReader
from penstock.sim.loop import run
from penstock.traffic import TraceMeta
from tests.cluster.moving_world import POLICIES, World

TTFT_S, TPOT_S = 0.3, 0.075
SLO = Slo(ttft_s=TTFT_S, tpot_s=TPOT_S)
FLEET = """
is_checked = true
[net]
latency_s = 1e-4
kv_bytes_per_s = 1e9
[[fleet]]
model = "llama-3.1-8b"
name = "default"
replicas = 2
roles = {prefill = 1, decode = 1}
executor = {kind = "modelled", gpu = "l4"}
cache = {num_blocks = 160, prefix = false}
[fleet.policy]
route = "least"
route_decode = "least"
order = "priority"
evict = "recompute-priority"
batch = {name = "leftover", tpot_s = 0.075}
"""
MOVE = "move = {name = 'offline', tpot_s = 0.075}\n[fleet.moves]\nslots = 4\n"


class Mixed:
    """Offline requests first, and online ones beside them."""

    meta = TraceMeta("mixed", "made here")

    def __iter__(self):  # type: ignore[no-untyped-def]
        for number in range(8):
            yield 0.0, made(f"offline-{number}", 100 + 40 * number, 300, priority=1)
        for number in range(12):
            yield 0.5 + 0.4 * number, made(f"online-{number}", 150, 30, slo=SLO)


def made(name: str, prompt: int, output: int, **fields: Any) -> Request:
    return Request(
        id=RequestId(name),
        model="default",
        prompt=TracedPrompt(prompt),
        sampling=Sampling(max_tokens=output, ignore_eos=True),
        true_output=output,
        **fields,
    )


def played(folder: Path, text: str) -> list[Any]:
    path, log = folder / "fleet.toml", folder / "log.jsonl"
    path.write_text(text)
    outcome = simulate(load_config(path), Mixed(), log_path=log)
    assert outcome.played.num_served == 20 and not outcome.played.errors
    for each in replay_log(log):
        assert each.difference is None
    return list(LogReader(log))


def moves_of(events: list[Any], kind: str) -> list[Migrated]:
    moved = [event for event in events if isinstance(event, Migrated)]
    return [event for event in moved if event.request.startswith(kind)]


def late(ended: list[Finished]) -> list[str]:
    """Requests whose promise was broken."""
    found = []
    for event in ended:
        assert event.first_token_at is not None and event.last_token_at is not None
        took_s = event.last_token_at - event.first_token_at
        is_slow = took_s > TPOT_S * (event.num_output - 1)
        if is_slow or event.first_token_at - event.arrived_at > TTFT_S:
            found.append(event.request)
    return found


def test_offline_requests_leave_prompts_behind_and_nobody_online_is_late(tmp_path: Path) -> None:
    events = played(tmp_path, FLEET + MOVE)
    pulled = [each for each in moves_of(events, "offline") if each.outcome == "committed"]
    assert len(pulled) >= 3 and {each.mode for each in pulled} == {"live"}
    assert {(each.source, each.target) for each in pulled} == {("default-0", "default-1")}
    assert {each.mode for each in moves_of(events, "online")} == {"pull"}
    starts = sorted(each.at - (each.pause_s or 0.0) for each in pulled)
    asked = sorted(each.asked_at for each in pulled)
    assert all(later >= at for at, later in zip(starts, asked[1:], strict=False))  # one at a time
    ended = [event for event in events if isinstance(event, Finished)]
    online = [event for event in ended if event.request.startswith("online")]
    assert len(online) == 12 and {event.who for event in online} == {"default-1"}
    assert not late(online) and not any(event.num_preemptions for event in online)
    # What was not pulled was written where its prompt was computed.
    places = {event.request: event.who for event in ended if event.request.startswith("offline")}
    assert {name for name, who in places.items() if who == "default-1"} == {
        each.request for each in pulled
    }


def test_without_the_policy_all_are_handed_on_and_fill_the_memory(tmp_path: Path) -> None:
    events = played(tmp_path, FLEET)
    assert {event.mode for event in moves_of(events, "")} == {"pull"}
    assert len(moves_of(events, "offline")) == 8
    ended = [event for event in events if isinstance(event, Finished)]
    assert late([event for event in ended if event.request.startswith("online")])
    assert not [
        event
        for event in events
        if isinstance(event, Stepped) and event.who == "default-0"
        and any(tokens == 1 for _, tokens in event.chunks)
    ]  # fmt: skip


def test_every_word_is_the_one_that_was_to_be_said() -> None:
    async def main() -> None:
        policies = {
            **POLICIES,
            "order": {"name": "priority"},
            "batch": {"name": "leftover", "max_tokens": 32},
            "evict": {"name": "recompute-priority"},
        }
        mover = find("move", "offline")(tpot_s=0.03, every_s=0.05, ahead_tokens=16)
        world = World(
            2, num_blocks=120, roles=("prefill", "decode"), mover=mover, policies=policies
        )
        await world.start()
        for place in range(6):
            world.ask(f"offline-{place}", list(range(place, 20 + 5 * place)), 60, priority=1)
        await asyncio.sleep(0.3)
        for place in range(4):
            world.ask(f"online-{place}", list(range(50 + place, 70)), 20)
            await asyncio.sleep(0.1)
        await world.end()
        world.check_texts()
        moved = [event for event in world.log.events if isinstance(event, Migrated)]
        live = [event for event in moved if event.mode == "live"]
        assert len(live) >= 2 and all(event.request.startswith("offline") for event in live)
        assert any(event.outcome == "committed" and event.num_blocks for event in live)
        await world.stop()

    run(main())
