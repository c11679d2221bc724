"""Images encoded here, prompts computed there, answers written elsewhere: in virtual time, whoever dies; replayed."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET

from penstock.assemble import load_config
from penstock.cluster import inside
from penstock.core.errors import BadConfig
from penstock.core.events import Finished, Reported, Routed, Scaled, Stepped
from penstock.core.images import parts_of
from penstock.core.moving import Migrated
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling
from penstock.lab.replay import replay_log
from penstock.lab.simulate import Simulated, simulate
from penstock.report.explain import Explainer
from penstock.report.log import LogReader
from penstock.traffic import TraceMeta

HIDDEN, EMBEDDING_BYTES = 3584, 2 * 3584  # of qwen2-7b
FLEET = """
is_checked = true
[net]
latency_s = 1e-4
bytes_per_s = 1e9
kv_bytes_per_s = {wire}
[[fleet]]
model = "qwen2-7b"
name = "m"
replicas = 4
roles = {roles}
executor = {{kind = "modelled", gpu = "a100-80g", vision = "qwen2-vl"}}
cache = {{num_blocks = {blocks}, prefix = false}}
policy = {{route = "least", route_decode = "least", {policy}}}
"""
EPD = 'batch = {name = "epd", max_tokens = 512, max_images = 2}'
IMAGES = ((999,), (), (888, 729), (256,))


class Shown:
    """Every fourth request is text alone."""

    meta = TraceMeta("shown", "made here")

    def __init__(self, count: int = 24) -> None:
        self._count = count

    def __iter__(self):  # type: ignore[no-untyped-def]
        for number in range(self._count):
            images = IMAGES[number % 4]
            num_prompt = 30 + number + sum(images)
            yield (
                number * 0.02,
                Request(
                    id=RequestId(f"r{number}"),
                    model="m",
                    prompt=TracedPrompt(num_prompt),
                    sampling=Sampling(max_tokens=12),
                    parts=parts_of(images, num_prompt),
                    true_output=12,
                ),
            )


def played(
    folder: Path,
    roles: str,
    *,
    policy: str = EPD,
    blocks: int = 4000,
    wire: float = 1e11,
    listeners: tuple[Any, ...] = (),
) -> tuple[Simulated, list[Any], Path]:
    path, log = folder / "fleet.toml", folder / "log.jsonl"
    told = FLEET.format(roles=roles, policy=policy, blocks=blocks, wire=wire)
    path.write_text(told if roles else told.replace("roles = \n", ""))
    outcome = simulate(load_config(path), Shown(), log_path=log, listeners=listeners)
    return outcome, list(LogReader(log)), log


def images_by_replica(events: list[Any]) -> Counter[str]:
    found: Counter[str] = Counter()
    for event in events:
        if isinstance(event, Stepped) and event.images:
            found[event.who] += sum(number for _, number in event.images)
    return found


def text_by_replica(events: list[Any]) -> set[str]:
    return {event.who for event in events if isinstance(event, Stepped) and event.chunks}


def test_images_prompts_and_answers_each_have_their_replicas(tmp_path: Path) -> None:
    outcome, events, log = played(tmp_path, "{encode = 1, prefill = 1, decode = 2}")
    assert outcome.played.num_served == 24 and not outcome.played.errors
    assert images_by_replica(events) == {"m-0": 24}  # four of every four requests
    assert text_by_replica(events) == {"m-1", "m-2", "m-3"}
    stages = Counter(event.stage for event in events if isinstance(event, Routed))
    assert stages == {"encode": 18, "prefill": 24, "decode": 24}
    places = {event.who for event in events if isinstance(event, Finished)}
    assert places == {"m-2", "m-3"}
    told = [event.report for event in events if isinstance(event, Reported)]
    assert max(report.image_tokens or 0 for report in told) > 0
    assert {report.role for report in told} == {"encode", "prefill", "decode"}
    # The embeddings of each token travel once, and keys and values after them.
    moved = [event for event in events if isinstance(event, Migrated)]
    assert {event.outcome for event in moved} == {"committed"} and len(moved) == 18 + 24
    sent = {event.request: event.num_bytes for event in moved if event.source == "m-0"}
    assert sent == {
        f"r{number}": sum(IMAGES[number % 4]) * EMBEDDING_BYTES
        for number in range(24)
        if IMAGES[number % 4]
    }
    for each in replay_log(log):
        assert each.difference is None


def test_a_slow_wire_is_paid_for_before_the_first_token(tmp_path: Path) -> None:
    firsts = []
    for wire in (1e11, 1e7):
        found: list[Any] = []
        played(
            tmp_path, "{encode = 1, prefill = 3}", wire=wire, listeners=(Explainer(found.append),)
        )
        firsts.append({each.request: each for each in found})
    fast, slow = firsts
    for name, way_s in (("r0", 999 * EMBEDDING_BYTES / 1e7), ("r2", 1617 * EMBEDDING_BYTES / 1e7)):
        assert slow[name].parts["transfer"] >= way_s
        assert fast[name].parts["transfer"] < 0.01
        for told in (fast[name], slow[name]):
            assert told.first_parts is not None
            assert told.first_parts["encode"] >= 0.04  # 40 ms an image of 999 tokens
            assert sum(told.parts.values()) == pytest.approx(told.e2e_s)
            assert "elsewhere" not in told.first_parts
    assert "encode" not in fast["r1"].parts  # text


def test_images_go_with_prompts_or_with_answers(tmp_path: Path) -> None:
    outcome, events, log = played(tmp_path, "{prefill = 2, decode = 2}")
    assert outcome.played.num_served == 24
    assert set(images_by_replica(events)) == {"m-0", "m-1"}
    for each in replay_log(log):
        assert each.difference is None
    outcome, events, log = played(tmp_path, "{encode-decode = 2, prefill = 2}")
    assert outcome.played.num_served == 24
    assert set(images_by_replica(events)) == {"m-0", "m-1"}
    prompts = {
        event.who
        for event in events
        if isinstance(event, Stepped) and any(tokens > 1 for _, tokens in event.chunks)
    }
    assert prompts == {"m-2", "m-3"}
    assert {event.who for event in events if isinstance(event, Finished)} == {"m-0", "m-1"}
    for each in replay_log(log):
        assert each.difference is None


@pytest.mark.parametrize("policy", [EPD, 'batch = "vllm-v1"', 'batch = "sglang"'])
def test_replicas_that_do_everything_encode_each_image_once(tmp_path: Path, policy: str) -> None:
    outcome, events, log = played(tmp_path, "", policy=policy)
    assert outcome.played.num_served == 24 and not outcome.played.errors
    assert sum(images_by_replica(events).values()) == 24
    for each in replay_log(log):
        assert each.difference is None


def test_whoever_is_preempted_is_encoded_again(tmp_path: Path) -> None:
    outcome, events, log = played(tmp_path, "", blocks=130)
    assert outcome.played.num_served == 24
    ended = [event for event in events if isinstance(event, Finished)]
    again = sum(event.num_preemptions * len(IMAGES[int(event.request[1:]) % 4]) for event in ended)
    assert again > 0 and sum(images_by_replica(events).values()) == 24 + again
    for each in replay_log(log):
        assert each.difference is None


def test_roles_follow_images(tmp_path: Path) -> None:
    """Images are taken to wait ten times as long as they do."""
    policy = EPD + ', scale = {name = "xllm", image_token_s = 4e-4}'
    outcome, events, log = played(tmp_path, "{encode = 1, prefill = 1, decode = 2}", policy=policy)
    assert outcome.played.num_served == 24 and not outcome.played.errors
    turned = [role for event in events if isinstance(event, Scaled) for _, role in event.roles]
    assert "encode" in turned
    assert set(images_by_replica(events)) > {"m-0"}
    for each in replay_log(log):
        assert each.difference is None


class Killer:
    """Ends a replica in the middle of its third step with images."""

    def __init__(self, name: str, hosts: dict[str, Any]) -> None:
        self.name, self.hosts, self.left = name, hosts, 3
        self.killing: asyncio.Task[None] | None = None

    def emit(self, event: Any) -> None:
        if isinstance(event, Stepped) and event.who == self.name and event.images:
            self.left -= 1
            if not self.left:
                self.killing = asyncio.get_running_loop().create_task(self._kill())

    async def _kill(self) -> None:
        await asyncio.sleep(0.02)
        await self.hosts[self.name].stop()


class KillerOfLeavers(Killer):
    """Ends a replica at the instant at which the first request is to leave it: it is never told so."""

    def emit(self, event: Any) -> None:
        if isinstance(event, Routed) and event.stage == "prefill" and event.tried is not UNSET:
            if self.killing is None:
                stop = self.hosts[self.name].stop()
                self.killing = asyncio.get_running_loop().create_task(stop)


def test_one_that_was_about_to_leave_a_replica_that_dies_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others could take it over, but there is nothing left to be taken."""
    hosts: dict[str, Any] = {}
    opened = inside.open_host

    def kept(spec: Any, *more: Any) -> Any:
        hosts[spec.name] = opened(spec, *more)
        return hosts[spec.name]

    monkeypatch.setattr(inside, "open_host", kept)
    killer = KillerOfLeavers("m-0", hosts)
    roles = "{encode = 1, prefill = 2, decode = 1}"
    outcome, events, _ = played(tmp_path, roles, listeners=(killer,))
    assert killer.killing is not None and killer.killing.done()
    assert outcome.played.num_served == 24 and not outcome.played.errors
    told = Counter(event.outcome for event in events if isinstance(event, Migrated))
    assert told["source_lost"] == 1 and set(told) == {"source_lost", "committed"}


@pytest.mark.parametrize(
    "roles",
    ["{encode = 2, prefill = 1, decode = 1}", "{encode = 1, prefill = 2, decode = 1}"],
)
def test_an_encode_replica_dies_and_no_request_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roles: str
) -> None:
    hosts: dict[str, Any] = {}
    opened = inside.open_host

    def kept(spec: Any, *more: Any) -> Any:
        hosts[spec.name] = opened(spec, *more)
        return hosts[spec.name]

    monkeypatch.setattr(inside, "open_host", kept)
    killer = Killer("m-0", hosts)
    outcome, events, log = played(tmp_path, roles, listeners=(killer,))
    assert killer.killing is not None and killer.killing.done()
    assert outcome.played.num_served == 24 and not outcome.played.errors
    ended = Counter(event.request for event in events if isinstance(event, Finished))
    assert set(ended.values()) == {1} and len(ended) == 24
    others = set(images_by_replica(events)) - {"m-0"}
    assert others == ({"m-1"} if "encode = 2" in roles else {"m-1", "m-2"})
    for name, host in hosts.items():
        if name != "m-0":
            assert host.replica.ledger.free == host.replica.ledger.total


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("{roles}", "has no vision tower|have no vision tower"),
        ("{batch}", "needs a batch policy that encodes"),
        ("{tower}", "no vision tower is named 'clip'"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(tmp_path: Path, setting: str, told: str) -> None:
    text = FLEET.format(roles="{encode = 4}", policy=EPD, blocks=100, wire=1e9)
    if setting == "{roles}":
        text = text.replace(', vision = "qwen2-vl"', "")
    elif setting == "{batch}":
        text = text.replace(EPD, 'batch = "vllm-v1"')
    else:
        text = text.replace("qwen2-vl", "clip")
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(BadConfig, match=told):
        load_config(path)


def test_replicas_without_a_tower_take_text_alone(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    text = FLEET.format(roles="{any = 4}", policy='batch = "vllm-v1"', blocks=4000, wire=1e9)
    path.write_text(text.replace(', vision = "qwen2-vl"', ""))
    outcome = simulate(load_config(path), Shown(), log_path=tmp_path / "log.jsonl")
    assert outcome.played.num_served == 6
