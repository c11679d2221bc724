"""xLLM: where prompts and answers go, who changes its role, and what offline work may take of a step."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.assemble import load_config
from penstock.core.events import Finished, Routed, Scaled
from penstock.core.types import Report, Slo
from penstock.cost.phases import Phases
from penstock.lab.replay import replay_log
from penstock.lab.role_flips import Turns
from penstock.lab.simulate import simulate
from penstock.policy import find, route, scale
from penstock.report.log import LogReader
from tests.policy.test_route import request_of

COST = Phases(prefill=(0.0, 1e-3, 0.0), decode=(0.01, 0.0, 1e-3))  # 1 ms a token, 10 + jobs ms
CODE = Path(__file__).parents[2] / "data" / "azure_2023_code_191.csv"


def report(name: str, role: Any, decoding: int = 0, waiting: int = 0, free: int = 100) -> Report:
    return Report(
        replica=name, at=0.0, role=role, num_running=decoding, num_decoding=decoding,
        decode_tokens=decoding * 100, waiting_tokens=waiting, free_blocks=free, total_blocks=100,
    )  # fmt: skip


def routed(
    reports: Sequence[Report], stage: Any, outstanding: Mapping[str, int] | None = None
) -> tuple[str | None, bool]:
    view = route.View(
        0.0, random.Random(0), request_of(num_tokens=100), stage, reports, outstanding or {},
        cost=COST, token_s=1e-3,
    )  # fmt: skip
    decision = find("route", "xllm")().decide(view)
    route.law(view, decision)
    return decision.replica, decision.is_overflow


def turned(*reports: Report, **parameters: Any) -> Mapping[str, str]:
    view = scale.View(
        0.0, random.Random(0), reports, {}, scale.Bounds(least=4, most=4), {}, cost=COST,
        token_s=1e-3,
    )  # fmt: skip
    decision = find("scale", "xllm")(**parameters).decide(view)
    scale.law(view, decision)
    return decision.roles


def test_answers_are_packed_until_the_pace_is_gone() -> None:
    """35 ms are 0.7 of the promise: 23 jobs and this one keep it, 26 do not."""
    first, second = report("a", "decode", 23), report("b", "decode")
    assert routed([second, first], "decode") == ("a", False)
    assert routed([report("a", "decode", 26), second], "decode") == ("b", False)
    assert routed([first, second], "decode", {"a": 26}) == ("b", False)  # one is on its way to it
    assert routed([report("a", "decode", 3, free=6), second], "decode") == ("b", False)  # no room
    full = [report("a", "decode", 50), report("b", "decode", 40)]
    assert routed(full, "decode") == ("b", False)


def test_a_prompt_spills_over_to_an_idle_writer_and_only_then() -> None:
    prompts = [report("p", "prefill", waiting=3000), report("q", "prefill", waiting=2000)]
    writers = [report("a", "decode", 10), report("b", "decode", 2)]
    assert routed([*prompts, *writers], "prefill") == ("b", True)
    assert routed([*prompts, report("q2", "prefill", waiting=900), *writers], "prefill") == (
        "q2",
        False,
    )
    assert routed([*prompts, writers[0]], "prefill") == ("q", False)  # the only one that writes
    busy = [report("a", "decode", 10), report("b", "decode", 9, waiting=5000)]
    assert routed([*prompts, *busy], "prefill") == ("q", False)


def encoder(name: str, image_tokens: int) -> Report:
    return Report(
        replica=name, at=0.0, role="encode", num_waiting=1 if image_tokens else 0,
        image_tokens=image_tokens, free_blocks=100, total_blocks=100,
    )  # fmt: skip


def test_images_go_where_the_fewest_wait() -> None:
    few, many = encoder("b", 500), encoder("a", 900)
    assert routed([many, few, report("d", "decode")], "encode") == ("b", False)
    assert routed([many, few, report("x", "encode-decode", 40)], "encode") == ("x", False)


def test_encoders_come_of_who_can_be_spared_and_go_where_they_are_needed() -> None:
    """Images wait 40 us a token, prompts 1 ms a token; half of the promise is 0.5 s."""
    p, q = report("p", "prefill", waiting=100), report("q", "prefill", waiting=200)
    writer, idle = report("d", "decode", 5), report("e", "decode")
    assert turned(p, q, writer, idle, encoder("v", 20_000)) == {"e": "encode"}
    assert turned(p, q, writer, idle, encoder("v", 12_000)) == {}
    assert turned(p, q, writer, encoder("v", 20_000)) == {"p": "encode"}
    late = report("q", "prefill", waiting=800)
    assert turned(p, late, writer, encoder("v", 20_000)) == {}  # prompts would be late
    assert turned(p, writer, encoder("v", 20_000)) == {}  # the only one that prefills
    # An idle one goes, a busy one or the last one stays.
    slow, behind = report("d", "decode", 60), report("p", "prefill", waiting=900)
    free, busy = encoder("w", 0), encoder("v", 100)
    assert turned(behind, writer, busy, free) == {"w": "prefill"}
    assert turned(report("p", "prefill"), slow, busy, free) == {"w": "decode"}
    assert turned(behind, writer, free) == {}
    assert turned(behind, writer, busy, encoder("w", 50)) == {}


def test_roles_change_by_need_and_keep_their_floors() -> None:
    slow, idle = report("d", "decode", 60), report("e", "decode")
    p, q = report("p", "prefill", waiting=1000), report("q", "prefill", waiting=100)
    assert turned(p, q, slow) == {"q": "decode"}
    assert turned(p, slow) == {}  # the last that computes prompts
    assert turned(p, q, report("d", "decode", 5)) == {}
    assert turned(p, q, slow, idle) == {"e": "prefill"}  # 550 ms is above half of the promise
    assert turned(report("p", "prefill"), q, slow, idle) == {}  # nobody needs it
    assert turned(p, q, slow, idle, least_decode=2) == {}


FLEET = """
is_checked = true
[net]
kv_bytes_per_s = 2e11
[[fleet]]
name = "default"
model = "opt-13b"
replicas = 4
roles = {prefill = 2, decode = 2}
executor = {kind = "modelled", gpu = "a100-80g", tables = "distserve"}
cache = {prefix = false}
policy = {route = "xllm", route_decode = "xllm", scale = "xllm"}
"""


def test_roles_follow_a_burst_and_every_decision_can_be_taken_again(tmp_path: Path) -> None:
    path, log = tmp_path / "fleet.toml", tmp_path / "log.jsonl"
    path.write_text(FLEET)
    burst = Turns(
        kinds=("code",), code=CODE, conv=CODE, num=60, rate_per_s=6.0, seed=1,
        slo=Slo(ttft_s=1.0, tpot_s=0.05),
    )  # fmt: skip
    outcome = simulate(load_config(path), burst, log_path=log)
    assert outcome.played.num_served == 60 and not outcome.played.errors
    events = list(LogReader(log))
    flips = [dict(event.roles) for event in events if isinstance(event, Scaled)]
    assert {"prefill"} <= {role for each in flips for role in each.values()}
    assert sum(isinstance(event, Finished) for event in events) == 60
    assert any(isinstance(event, Routed) and event.stage == "decode" for event in events)
    for each in replay_log(log):
        assert each.difference is None
