"""What a router keeps up to date between decisions says the same as looking at every report anew."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from msgspec import structs

from penstock.cluster.router import Router
from penstock.cluster.sight import DispatchConfig, Sight
from penstock.core.messages import BlockNews
from penstock.core.prompt import HashedPrompt
from penstock.core.types import BlockHash, Report, Request, RequestId
from penstock.cost.phases import Phases
from penstock.policy import find
from penstock.policy.route import Decision, View
from penstock.report.log import Memory

SIZE, REPLICAS = 16, [f"r{number}" for number in range(9)]
COST = Phases(prefill=(0.02, 1e-4, 7e-9), decode=(0.02, 6e-7, 4e-5))
ROUTERS = (
    "affinity", "dualmap", "dynamo", "least-tokens", "llm-d", "llumnix", "mooncake", "preble", "xllm", "xllm-cache",
)  # fmt: skip


class Twice:
    """Two of one policy; the second is shown the reports and nothing that was kept."""

    needs_blocks = needs_cost = needs_queued = True

    def __init__(self, name: str) -> None:
        self.one, self.other = find("route", name)(), find("route", name)()

    def decide(self, view: View) -> Decision:
        bare = structs.replace(view, rng=copy.deepcopy(view.rng), kept=None, kept_loads=None)
        decision, plain = self.one.decide(view), self.other.decide(bare)
        assert decision == plain
        assert view.pendings(view.candidates()) == [
            view.pending(each) for each in bare.reports if each in view.candidates()
        ]
        assert isinstance(decision, Decision)
        return decision


def request_of(number: int, chance: random.Random) -> Request:
    talk, blocks = chance.randrange(30), chance.randrange(60)
    names = [b"all" if place < 2 else b"%d" % talk for place in range(blocks)]
    hashes = tuple(BlockHash(name + place.to_bytes(2, "big")) for place, name in enumerate(names))
    prompt = HashedPrompt(blocks * SIZE + 5, hashes, SIZE)
    return Request(id=RequestId(f"q{number}"), model="m", prompt=prompt)


def report_of(name: str, chance: random.Random, router: Router) -> Report:
    return Report(
        replica=name,
        at=0.0,
        is_draining=chance.random() < 0.05,
        num_running=chance.randrange(9),
        num_waiting=chance.randrange(9),
        waiting_tokens=chance.randrange(40_000),
        cached_tokens=chance.randrange(90),
        prefill_tokens=chance.randrange(900),
        total_blocks=900,
        free_blocks=chance.randrange(900),
        decode_tokens=chance.randrange(900),
        absorbed=router.last_seq(name) - chance.randrange(2),
    )


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_keeps_what_its_reports_say(name: str, counts: bool) -> None:
    chance, policy = random.Random(f"{name} {counts}"), Twice(name)
    sight = Sight((policy,), DispatchConfig(counts=counts), cost=COST)
    router = Router("fleet", policy, log=Memory(), sight=sight, is_checked=True)
    under_way: list[tuple[Any, str]] = []
    for each in REPLICAS:
        router.hear(0.0, report_of(each, chance, router))
    for number in range(150):
        at, request = number / 20, request_of(number, chance)
        chosen = router.choose(at, request)
        if chosen is not None:
            under_way.append((request.id, chosen))
        if len(under_way) > 40:
            ended = under_way.pop(chance.randrange(20))
            router.begin(at, *ended)
            router.end(at, *ended)
        told = chance.choice(REPLICAS)
        router.hear(at, report_of(told, chance, router))
        if number % 4 == 0:
            router.tell(at, told, BlockNews(request.prompt.blocks(SIZE), ()))
    assert len(under_way) == 40 and len(router.outstanding) == len(REPLICAS)
