"""What waits in an outbox keeps its order, whatever the channel takes at once."""

from __future__ import annotations

import asyncio

from penstock.core.messages import Cancel
from penstock.net import local
from penstock.net.outbox import Outbox
from penstock.sim.loop import run


def test_order_is_kept_when_the_channel_pushes_back() -> None:
    async def body() -> None:
        near, far = local.pair(limit=3)
        outbox = Outbox(near)
        for number in range(10):
            outbox.put(Cancel(str(number)))
        assert len(outbox) == 7
        heard: list[object] = []
        far.listen(heard.append)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        outbox.put(Cancel("late"))
        await outbox.flush()
        await asyncio.sleep(1)
        assert heard == [Cancel(name) for name in [*"0123456789", "late"]]
        assert len(outbox) == 0
        outbox.put(Cancel("again"))
        await asyncio.sleep(1)
        assert heard[-1] == Cancel("again")

    run(body())


def test_a_closed_channel_drops_what_waits_and_releases_who_flushes() -> None:
    async def body() -> None:
        near, far = local.pair(limit=1)
        outbox = Outbox(near)
        for number in range(5):
            outbox.put(Cancel(str(number)))
        flushing = asyncio.create_task(outbox.flush())
        await asyncio.sleep(1)
        assert not flushing.done()
        await far.close()
        await flushing
        outbox.put(Cancel("late"))
        assert len(outbox) == 0

    run(body())
