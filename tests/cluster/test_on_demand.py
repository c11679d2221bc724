"""Replicas without a queue, and requests that ask them one after the other until their time is over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from penstock.assemble import load_config
from penstock.cluster.fleet import Fleet
from penstock.cluster.router import Router
from penstock.core.clock import now
from penstock.core.errors import BadConfig, ReplicaLost
from penstock.core.events import Event, Finished, Refused, Routed
from penstock.core.prompt import HashedPrompt, TracedPrompt
from penstock.core.types import Request, RequestId, Sampling, Slo
from penstock.lab.replay import replay
from penstock.lab.simulate import simulate
from penstock.policy import route
from penstock.policy.route.on_demand import KEPT_S, OnDemand
from penstock.report.log import Memory
from penstock.sim.loop import run
from penstock.traffic import TraceMeta
from tests.cluster.null import NullReplica
from tests.policy.test_route import reports_of, request_of

TTFT_S = 2.0


class Burst:
    """All at once, prompts of one length, one token each."""

    meta = TraceMeta("burst", "made")

    def __init__(self, num: int) -> None:
        self.num = num

    def __iter__(self):  # type: ignore[no-untyped-def]
        for place in range(self.num):
            yield (
                0.0,
                Request(
                    id=RequestId(str(place)),
                    model="default",
                    prompt=TracedPrompt(1500),
                    sampling=Sampling(max_tokens=1),
                    slo=Slo(ttft_s=TTFT_S),
                    true_output=1,
                ),
            )


class Heard:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, (Finished, Refused, Routed)):
            self.events.append(event)


def simulated(num: int, log: Path | None = None, **fleet: object) -> list[Event]:
    settings: dict[str, object] = {
        "name": "default",
        "replicas": 2,
        "executor": {"kind": "modelled", "gpu": "a100-80g", "tables": "distserve"},
        "cache": {"prefix": False},
        "max_open": 1,
        "policy": {"preset": "vllm-v1", "route": "on-demand"},
        **fleet,
    }
    flags: dict[str, object] = {f"fleet.0.{name}": told for name, told in settings.items()}
    config = load_config(model="opt-13b", flags={**flags, "net.latency_s": 0.001})
    heard = Heard()
    simulate(config, Burst(num), listeners=(heard,), log_path=log)
    return heard.events


def test_a_burst_is_served_one_by_one_until_time_is_over() -> None:
    """A prompt of 1,500 tokens takes 0.19 s here: two replicas start eleven each within 2 s, others are told."""
    events = simulated(30)
    served = [each for each in events if isinstance(each, Finished)]
    told = {
        each.code for each in events if isinstance(each, Refused) and each.who == "fleet-default"
    }
    assert len(served) == 22
    assert told == {"Overloaded"}
    ends = sorted(each.at for each in served)
    assert all(later - early > 0.18 for early, later in zip(ends, ends[2:], strict=False))
    assert max(each.at for each in events) < TTFT_S + 0.3


def test_waiting_requests_replay(tmp_path: Path) -> None:
    simulated(12, tmp_path / "run.log")
    for outcome in replay(tmp_path / "run.log"):
        assert outcome.difference is None, str(outcome.difference)


def test_without_the_policy_a_replica_without_a_queue_turns_bursts_away() -> None:
    events = simulated(10, policy={"preset": "vllm-v1", "route": "least"})
    assert sum(isinstance(each, Finished) for each in events) == 2


def test_a_request_that_waits_can_be_cancelled() -> None:
    async def body() -> None:
        router = Router("fleet", OnDemand(), log=Memory(), is_checked=True)
        replica = NullReplica("r0")
        fleet = Fleet("m", [replica], router)
        replica.is_alive = False
        replica.say()
        request = Request(id=RequestId("a"), model="m", prompt=HashedPrompt(8))
        task = asyncio.create_task(fleet.submit(request))
        await asyncio.sleep(0.01)
        assert fleet.num_outstanding == 1
        task.cancel()
        await asyncio.sleep(0.01)
        assert fleet.num_outstanding == 0
        late = Request(id=RequestId("b"), model="m", prompt=HashedPrompt(8), slo=Slo(ttft_s=0.1))
        with pytest.raises(ReplicaLost, match="none of the 1 replicas"):
            await fleet.submit(late)
        assert now() == pytest.approx(0.12, abs=0.005)

    run(body())


def test_patience_is_forgotten_when_it_is_over() -> None:
    policy = OnDemand(patience_s=0.5)
    for place in range(300):
        request = request_of()
        request = Request(id=RequestId(str(place)), model="m", prompt=request.prompt)
        at = 0.1 * place
        view = route.View(at, None, request, "prefill", reports_of("ab"), {})  # type: ignore[arg-type]
        assert policy.decide(view).replica in ("a", "b")
    assert len(policy._until) <= 10 * (KEPT_S + 0.5) + 2


def test_bounds_are_checked() -> None:
    with pytest.raises(BadConfig, match="max_open must be at least 1"):
        load_config(model="default", flags={"fleet.0.max_open": 0})
