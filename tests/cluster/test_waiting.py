"""First come, first asked: nobody takes the place that somebody waited for, and promises go on running out."""

from __future__ import annotations

import asyncio

from penstock.cluster.fleet import Fleet
from penstock.cluster.router import Router
from penstock.core.prompt import HashedPrompt
from penstock.core.types import Request, RequestId, Slo
from penstock.policy.route.on_demand import OnDemand
from penstock.report.log import Memory
from penstock.sim.loop import run
from tests.cluster.null import NullReplica


def request(name: str) -> Request:
    return Request(
        id=RequestId(name), model="m", prompt=HashedPrompt(8), slo=Slo(ttft_s=3.0, deadline_s=9.0)
    )


def test_who_waits_is_asked_about_in_turn_with_what_is_left_of_its_promise() -> None:
    async def body() -> None:
        router = Router("fleet", OnDemand(retry_s=0.5), log=Memory(), is_checked=True)
        replica = NullReplica("r0")
        fleet = Fleet("m", [replica], router)
        replica.is_alive = False
        replica.say()
        tasks = [asyncio.create_task(fleet.submit(request(name))) for name in "abc"]
        await asyncio.sleep(1.2)
        assert replica.seen == []
        replica.is_alive = True
        replica.say()
        await asyncio.sleep(0.5)
        assert replica.seen == ["a"]  # the timer asks for the first alone
        late = asyncio.create_task(fleet.submit(request("d")))
        await asyncio.sleep(0.01)
        assert replica.seen == ["a"], "d stands behind b and c"
        held = replica.held["a"].request.slo
        assert held.ttft_s is not None and 1.2 <= 3.0 - held.ttft_s <= 1.8
        assert held.deadline_s is not None and 1.2 <= 9.0 - held.deadline_s <= 1.8
        tasks[1].cancel()
        await asyncio.sleep(2.0)
        assert replica.seen[:3] == ["a", "c", "d"]
        for task in (*tasks, late):
            task.cancel()

    run(body())
