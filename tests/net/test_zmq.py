"""The channel between processes, where it differs from its twins (see tests/twins/test_channel.py)."""

from __future__ import annotations

import asyncio
import shutil

from penstock.core.messages import Cancel, Message
from penstock.net.codec import Codec
from penstock.net.zmq import ZmqChannel, private_endpoint


async def test_a_listener_that_raises_still_hears_what_came_behind() -> None:
    endpoint, folder = private_endpoint()
    near = ZmqChannel.bind(endpoint, Codec(Message))
    far = ZmqChannel.connect(endpoint, Codec(Message))
    heard: list[str] = []
    broken: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: broken.append(told))
    all_heard = asyncio.Event()

    def hear(message: object) -> None:
        assert isinstance(message, Cancel)
        heard.append(message.request)
        if message.request == "0":
            raise ValueError("a broken listener")
        if message.request == "9":
            all_heard.set()

    for number in range(10):  # all are there before anybody listens, so one event tells of them
        await far.send(Cancel(f"{number}"))
    await asyncio.sleep(0.3)
    near.listen(hear)
    try:
        await asyncio.wait_for(all_heard.wait(), 3)
    finally:
        await near.close()
        await far.close()
        shutil.rmtree(folder)
    assert heard == [f"{number}" for number in range(10)] and len(broken) == 1
