"""A modelled link between two parts: latency and bandwidth, in order, both ways alike.

Each direction sends one message after the other, so big ones delay those behind them:

    leaves at  = max(sent at, the instant the one before has left) + num_bytes / bandwidth
    arrives at = leaves at + latency

On an ideal link, which charges nothing, a message arrives on the next turn of the loop and needs no timer.

`send` returns when the message is queued, and waits only while `limit` messages are under way or unheard. The end of a
channel travels like a message: the peer hears of it after all that was sent before.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.errors import ReplicaLost

LIMIT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What a message costs on its way. `bytes_per_s` of infinity: size does not matter."""

    latency_s: float = 0.0
    bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        if not (self.latency_s >= 0 and self.bytes_per_s > 0):
            raise ValueError("a link needs latency_s of 0 or more and a positive bytes_per_s")

    @property
    def is_ideal(self) -> bool:
        return not self.latency_s and math.isinf(self.bytes_per_s)


class _End:
    """Travels behind the last message of an end that closed."""


class ModelledChannel:
    """One end; `pair()` makes two."""

    def __init__(self, link: Link, limit: int = LIMIT) -> None:
        self._link, self._limit = link, limit
        self._is_ideal = link.is_ideal
        self._loop = asyncio.get_running_loop()
        self._peer: ModelledChannel = self
        self._inbox: deque[tuple[float, object]] = deque()  # under way to this end, or unheard
        self._free_at = -math.inf  # when this end's sending side is free again
        self._on_message: Callable[[object], None] | None = None
        self._on_closed: Callable[[str], None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._timer: asyncio.Handle | None = None
        self._is_closed = False

    async def send(self, message: object, num_bytes: int = 0) -> None:
        peer = self._peer
        while len(peer._inbox) >= self._limit and not (self._is_closed or peer._is_closed):
            if peer._room is None or peer._room.done():
                peer._room = self._loop.create_future()
            await asyncio.shield(peer._room)
        if self._is_closed or peer._is_closed:
            raise ReplicaLost("the channel is closed")
        self._put(message, num_bytes)

    def offer(self, message: object, num_bytes: int = 0) -> bool:
        peer = self._peer
        if self._is_closed or peer._is_closed:
            raise ReplicaLost("the channel is closed")
        if len(peer._inbox) >= self._limit:
            return False
        self._put(message, num_bytes)
        return True

    def listen(self, on_message: Callable[[object], None]) -> None:
        self._on_message = on_message
        self._schedule()

    def watch(self, on_closed: Callable[[str], None]) -> None:
        self._on_closed = on_closed
        self._schedule()

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._inbox.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._wake()
        self._peer._wake()
        self._put(_End(), 0)

    def _put(self, message: object, num_bytes: int) -> None:
        peer, link = self._peer, self._link
        if peer._is_closed:
            return
        if self._is_ideal:
            peer._inbox.append((-math.inf, message))
        else:
            self._free_at = max(self._loop.time(), self._free_at) + num_bytes / link.bytes_per_s
            peer._inbox.append((self._free_at + link.latency_s, message))
        if peer._timer is None:
            peer._schedule()

    def _schedule(self) -> None:
        """Set the timer of the first message; the ones behind it cannot arrive earlier."""
        if self._timer is None and self._inbox and self._on_message is not None:
            if self._is_ideal:
                self._timer = self._loop.call_soon(self._deliver)
            else:
                self._timer = self._loop.call_at(self._inbox[0][0], self._deliver)

    def _deliver(self) -> None:
        self._timer = None
        inbox, at, hear = self._inbox, self._loop.time(), self._on_message
        assert hear is not None
        try:
            while inbox and not self._is_closed:
                arrives_at, message = inbox[0]
                if arrives_at > at:
                    break
                if isinstance(message, _End):
                    self._tell_end()
                    return
                inbox.popleft()
                hear(message)
        finally:
            self._wake()
            if inbox and not self._is_closed:
                is_unwatched = inbox[0][0] <= at and isinstance(inbox[0][1], _End)
                if not is_unwatched:
                    self._schedule()

    def _tell_end(self) -> None:
        """Once; an end that came before anybody watched is told to the first who does."""
        if self._on_closed is not None:
            self._inbox.popleft()
            on_closed, self._on_closed = self._on_closed, None
            on_closed("the peer closed the channel")

    def _wake(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)


def pair(link: Link, limit: int = LIMIT) -> tuple[ModelledChannel, ModelledChannel]:
    """The two ends of a modelled link. Needs a running loop."""
    near, far = ModelledChannel(link, limit), ModelledChannel(link, limit)
    near._peer, far._peer = far, near
    return near, far
