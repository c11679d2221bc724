"""Two ends in one process. A message is handed over as the object it is, on the next turn of the loop, in order.

Memory: messages wait in one deque an end, and at most `limit` of them; then `send` waits until the peer took one.
Closing one end tells the peer after it has heard everything sent before.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from penstock.core.errors import ReplicaLost

LIMIT = 4096


class LocalChannel:
    """One end; `pair()` makes two."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._inbox: deque[object] = deque()
        self._peer: LocalChannel = self
        self._on_message: Callable[[object], None] | None = None
        self._on_closed: Callable[[str], None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._is_scheduled = False
        self._is_closed = False  # by this end
        self._end: str | None = None  # why the peer is gone

    async def send(self, message: object, num_bytes: int = 0) -> None:
        peer = self._peer
        while len(peer._inbox) >= self._limit and not (self._is_closed or peer._is_closed):
            if peer._room is None or peer._room.done():
                peer._room = asyncio.get_running_loop().create_future()
            await asyncio.shield(peer._room)
        self._put(message)

    def offer(self, message: object, num_bytes: int = 0) -> bool:
        peer = self._peer
        if len(peer._inbox) >= self._limit and not (self._is_closed or peer._is_closed):
            return False
        self._put(message)
        return True

    def _put(self, message: object) -> None:
        peer = self._peer
        if self._is_closed or peer._is_closed:
            raise ReplicaLost("the channel is closed")
        peer._inbox.append(message)
        peer._schedule()

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
        self._wake()
        self._peer._end = self._peer._end or "the peer closed the channel"
        self._peer._wake()
        self._peer._schedule()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._deliver)

    def _deliver(self) -> None:
        self._is_scheduled = False
        if self._on_message is None or self._is_closed:
            return
        try:
            for _ in range(len(self._inbox)):  # what arrives meanwhile waits for the next turn
                self._on_message(self._inbox.popleft())
                if self._is_closed:
                    return
        finally:
            self._wake()
            if self._inbox:
                self._schedule()
        if not self._inbox and self._end is not None and self._on_closed is not None:
            on_closed, self._on_closed = self._on_closed, None
            on_closed(self._end)

    def _wake(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)


def pair(limit: int = LIMIT) -> tuple[LocalChannel, LocalChannel]:
    """The two ends of a channel inside this process. Needs a running loop."""
    near, far = LocalChannel(limit), LocalChannel(limit)
    near._peer, far._peer = far, near
    return near, far
