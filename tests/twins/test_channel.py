"""Every channel, real or modelled, keeps the same promises. A new channel is one more entry in CHANNELS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from penstock.core.errors import PenstockError
from penstock.core.messages import Cancel, Message
from penstock.core.ports import Channel
from penstock.net import local
from penstock.net.codec import Codec
from penstock.net.polled import Mailbox, Polled
from penstock.net.zmq import ZmqChannel, private_endpoint
from penstock.sim import channel as modelled
from penstock.sim.cable import Cable
from penstock.sim.loop import run as run_virtual

Pair = tuple[Channel, Channel]


@asynccontextmanager
async def open_local() -> AsyncIterator[Pair]:
    near, far = local.pair(limit=64)
    yield near, far
    await near.close()
    await far.close()


@asynccontextmanager
async def open_zmq() -> AsyncIterator[Pair]:
    endpoint, folder = private_endpoint()
    near = ZmqChannel.bind(endpoint, Codec(Message))
    far = ZmqChannel.connect(endpoint, Codec(Message))
    yield near, far
    await near.close()
    await far.close()
    (folder / "engine").unlink(missing_ok=True)
    folder.rmdir()


@asynccontextmanager
async def open_modelled() -> AsyncIterator[Pair]:
    near, far = modelled.pair(modelled.Link(latency_s=0.002, bytes_per_s=1e6), limit=64)
    yield near, far
    await near.close()
    await far.close()


@asynccontextmanager
async def open_cable() -> AsyncIterator[Pair]:
    cable = Cable(latency_s=0.002, limit=64)
    yield cable.near, cable.far
    await cable.near.close()
    await cable.far.close()


@asynccontextmanager
async def open_polled() -> AsyncIterator[Pair]:
    """Calls that take a moment, as those to another process do."""
    far = Mailbox(Codec(Message))

    async def push(frames: list[bytes]) -> None:
        await asyncio.sleep(0.001)
        far.hear(frames)

    async def pull() -> list[bytes]:
        await asyncio.sleep(0.001)
        return await far.take()

    near = Polled(Codec(Message), push, pull)
    yield near, far
    await near.close()
    await far.close()


def on_wall(body: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(body, 20)

    asyncio.run(bounded())


def on_virtual(body: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(body, 3600)

    run_virtual(bounded())


# name -> (how to open a pair of ends, how to run a coroutine that uses them).
CHANNELS = {
    "cable": (open_cable, on_virtual),
    "local": (open_local, on_wall),
    "polled": (open_polled, on_virtual),
    "modelled": (open_modelled, on_virtual),
    "zmq": (open_zmq, on_wall),
}


@pytest.fixture(params=sorted(CHANNELS))
def check(request: pytest.FixtureRequest) -> Callable[[Callable[[Channel, Channel], object]], None]:
    opened, run = CHANNELS[request.param]

    def checked(body: Callable[[Channel, Channel], object]) -> None:
        async def scenario() -> None:
            async with opened() as (near, far):
                await body(near, far)  # type: ignore[misc]

        run(scenario())

    return checked


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def messages(count: int, prefix: str = "") -> list[Cancel]:
    return [Cancel(f"{prefix}{i}") for i in range(count)]


def test_messages_arrive_whole_and_in_order_both_ways(check) -> None:
    async def body(near: Channel, far: Channel) -> None:
        at_far: list[object] = []
        at_near: list[object] = []
        far.listen(at_far.append)
        near.listen(at_near.append)
        there, back = messages(500, "there"), messages(500, "back" * 1000)

        async def send(channel: Channel, told: list[Cancel]) -> None:
            for message in told:
                await channel.send(message, 100)

        await asyncio.gather(send(near, there), send(far, back))
        await until(lambda: len(at_far) == 500 and len(at_near) == 500)
        assert at_far == there and at_near == back

    check(body)


def test_nothing_is_delivered_inside_send(check) -> None:
    async def body(near: Channel, far: Channel) -> None:
        heard: list[object] = []
        far.listen(heard.append)
        near.listen(lambda message: None)
        sending = near.send(Cancel("a"))
        assert heard == []
        await sending
        await until(lambda: bool(heard))
        assert heard == [Cancel("a")]

    check(body)


def test_what_was_sent_before_listening_is_kept(check) -> None:
    async def body(near: Channel, far: Channel) -> None:
        near.listen(lambda message: None)
        for message in messages(20):
            await near.send(message)
        await asyncio.sleep(0.01)
        heard: list[object] = []
        far.listen(heard.append)
        await until(lambda: len(heard) == 20)
        assert heard == messages(20)

    check(body)


def test_a_peer_that_closes_is_heard_after_its_last_message(check) -> None:
    async def body(near: Channel, far: Channel) -> None:
        heard: list[object] = []
        ends: list[int] = []
        near.listen(heard.append)
        near.watch(lambda why: ends.append(len(heard)))
        far.listen(lambda message: None)
        for message in messages(50):
            await far.send(message)
        await until(lambda: len(heard) >= 1)  # connected
        await far.close()
        await until(lambda: bool(ends))
        assert heard == messages(50)
        assert ends == [50]

    check(body)


def test_closing_ones_own_end_is_not_news_and_refuses_sends(check) -> None:
    async def body(near: Channel, far: Channel) -> None:
        ends: list[str] = []
        near.listen(lambda message: None)
        near.watch(ends.append)
        far.listen(lambda message: None)
        await near.send(Cancel("a"))
        await near.close()
        await near.close()
        await asyncio.sleep(0.01)
        assert ends == []
        with pytest.raises(PenstockError):
            await near.send(Cancel("b"))

    check(body)


def test_a_cancelled_send_loses_no_other_message(check) -> None:
    async def body(near: Channel, far: Channel) -> None:
        near.listen(lambda message: None)

        async def flood() -> None:
            for message in messages(100_000):
                await near.send(message)

        flooding = asyncio.create_task(flood())
        await asyncio.sleep(0.05)
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        heard: list[object] = []
        far.listen(heard.append)
        last = Cancel("last")
        await near.send(last)
        await until(lambda: bool(heard) and heard[-1] == last)
        assert heard[:-1] == messages(len(heard) - 1)

    check(body)


def test_an_offer_is_taken_in_its_place_or_not_at_all(check) -> None:
    async def body(near: Channel, far: Channel) -> None:
        near.listen(lambda message: None)
        await near.send(Cancel("first"))  # waits until there is a peer
        told = messages(100_000)
        taken = [message for message in told if near.offer(message)]
        assert 0 < len(taken) < len(told), "the channel never pushed back"
        heard: list[object] = []
        far.listen(heard.append)
        await until(lambda: len(heard) == 1 + len(taken))
        await asyncio.sleep(0.05)
        assert heard == [Cancel("first"), *taken]
        await near.close()
        with pytest.raises(PenstockError):
            near.offer(Cancel("late"))

    check(body)
