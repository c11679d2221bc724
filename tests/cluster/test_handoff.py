"""Prompts computed here and answers written there: in virtual time, word for word, whatever dies, and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.assemble import load_config
from penstock.core.events import Arrived, Finished, Opened, Routed, Stepped
from penstock.core.moving import Granted, Migrated, WentOn
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling
from penstock.lab.replay import replay_log
from penstock.lab.simulate import Simulated, simulate
from penstock.report.log import LogReader
from penstock.report.made import MadeReplica, made_of
from penstock.traffic import TraceMeta

FLEET = """
is_checked = true
[net]
latency_s = 1e-4
bytes_per_s = 1e9
[[fleet]]
model = "default"
replicas = 4
roles = {roles}
executor = {{kind = "modelled", gpu = "l4"}}
cache = {{num_blocks = {blocks}}}
policy = {{route = "least", route_decode = "least"}}
"""


class Few:
    """Requests of which every third is short enough to end with its first token."""

    meta = TraceMeta("few", "made here")

    def __init__(self, count: int = 30) -> None:
        self._count = count

    def __iter__(self):  # type: ignore[no-untyped-def]
        for number in range(self._count):
            output = 1 if number % 3 == 0 else 40
            yield (
                number * 0.004,
                Request(
                    id=RequestId(f"r{number}"),
                    model="default",
                    prompt=TracedPrompt(200 + number),
                    sampling=Sampling(max_tokens=output, ignore_eos=True),
                    true_output=output,
                ),
            )


def played(folder: Path, roles: str, blocks: int = 400) -> tuple[Simulated, list[Any], Path]:
    path, log = folder / "fleet.toml", folder / "log.jsonl"
    path.write_text(FLEET.format(roles=roles, blocks=blocks))
    outcome = simulate(load_config(path), Few(), log_path=log)
    return outcome, list(LogReader(log)), log


def test_prompts_are_computed_by_some_and_answers_written_by_others(tmp_path: Path) -> None:
    outcome, events, log = played(tmp_path, "{prefill = 2, decode = 2}")
    assert outcome.played.num_served == 30 and not outcome.played.errors
    moved = [event for event in events if isinstance(event, Migrated)]
    assert len(moved) == 20 and {event.outcome for event in moved} == {"committed"}
    assert all(event.mode == "pull" and event.num_blocks for event in moved)
    ended = {event.request: event for event in events if isinstance(event, Finished)}
    places = {name: event.who for name, event in ended.items() if event.num_output > 1}
    assert set(places.values()) == {"default-2", "default-3"}
    # A prefill replica plans the prompt's tokens and nothing else, a decode replica one token a job.
    for event in events:
        if isinstance(event, Stepped) and event.who in ("default-0", "default-1"):
            assert all(tokens > 1 for _, tokens in event.chunks)
    stages = [event.stage for event in events if isinstance(event, Routed)]
    assert stages.count("prefill") == 30 and stages.count("decode") == 20
    # First tokens are those of the prefill replicas: the life of a request goes on, it does not begin again.
    first = {event.request: event.at for event in events if isinstance(event, Arrived)}
    assert all(ended[name].arrived_at <= first[name] + 1e-9 for name in places)
    for each in replay_log(log):
        assert each.difference is None


def test_where_nobody_writes_answers_they_are_written_where_they_began(tmp_path: Path) -> None:
    outcome, events, _ = played(tmp_path, "{prefill = 4}")
    assert outcome.played.num_served == 30
    assert not any(isinstance(event, Migrated) for event in events)


def test_a_full_decode_replica_holds_prefill_back_and_loses_nothing(tmp_path: Path) -> None:
    outcome, events, log = played(tmp_path, "{prefill = 3, decode = 1}", blocks=48)
    assert outcome.played.num_served == 30 and not outcome.played.errors
    assert sum(isinstance(event, Migrated) for event in events) >= 20
    for each in replay_log(log):
        assert each.difference is None


@pytest.mark.parametrize("roles", ["{prefill = 2, decode = 2}"])
def test_nobody_is_told_to_go_on_while_somebody_takes(tmp_path: Path, roles: str) -> None:
    _, events, _ = played(tmp_path, roles)
    assert not any(isinstance(event, WentOn) for event in events)


def test_no_more_is_pulled_than_the_share_that_may_wait_there(tmp_path: Path) -> None:
    """While a step runs that they are not in, those that come fill no more than that, or one more request."""
    template = FLEET.replace('policy = {{route = "least", route_decode = "least"}}\n', "")
    template = template.replace('"default"', '"llama-3.1-8b"\nname = "default"')
    most = {}
    for share in ("", "hand_off = {pull_share = 0.05}\n"):
        more = share + "[fleet.policy]\nroute = 'least'\nroute_decode = 'least'\n"
        path, log = tmp_path / "fleet.toml", tmp_path / "log.jsonl"
        path.write_text(template.format(roles="{prefill = 3, decode = 1}", blocks=400) + more)
        outcome = simulate(load_config(path), Few(), log_path=log)
        assert outcome.played.num_served == 30 and not outcome.played.errors
        most[share] = _most_waiting(list(LogReader(log)), "default-3")
        for each in replay_log(log):
            assert each.difference is None
    bounded, free = most.pop("hand_off = {pull_share = 0.05}\n"), most.pop("")
    # Of 400 blocks that share is 20, and each request has 13 to 15.
    assert bounded == 2 and free > 3


def _most_waiting(events: list[Any], who: str) -> int:
    """Requests that were granted there between two steps, at most."""
    waiting = most = 0
    for event in events:
        if event.who == who:
            waiting = 0 if isinstance(event, Stepped) else waiting + isinstance(event, Granted)
            most = max(most, waiting)
    return most


def test_a_prompt_that_no_writer_has_room_for_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Devices of one role hold less: such a request goes on where it began, and those behind it are pulled."""
    degrees = "hand_off = {degrees = {prefill = 4, decode = 1}}\n"
    text = FLEET.format(roles="{prefill = 3, decode = 1}", blocks=0)
    text = text.replace("cache = {num_blocks = 0}\n", degrees).replace('"l4"', '"a100-80g"')
    text = text.replace('"default"', '"llama-3.1-8b"\nname = "default"')
    path, log = tmp_path / "fleet.toml", tmp_path / "log.jsonl"
    path.write_text(text)
    outcome = simulate(load_config(path), Few(), log_path=log)
    assert outcome.played.num_served == 30
    made = {event.who: made_of(event) for event in LogReader(log) if isinstance(event, Opened)}
    blocks = {who: each.num_blocks for who, each in made.items() if isinstance(each, MadeReplica)}
    assert blocks["default-0"] > 3 * blocks["default-3"]
    for each in replay_log(log):
        assert each.difference is None
