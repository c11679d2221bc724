"""Sends for callers that cannot wait: what the channel does not take at once queues here, and one task hands it over.

Order is kept: while anything waits, all that is put waits behind it. Memory: the queue grows while the channel pushes
back, so whoever puts must be bounded by something else (a fleet by its outstanding requests, a replica by its running
jobs). After the channel closed, what is put is dropped: whoever watches the channel knows.
"""

from __future__ import annotations

import asyncio
from collections import deque

from penstock.core.errors import ReplicaLost
from penstock.core.ports import Channel


class Outbox:
    """One per channel end. Needs a running loop from the first `put` on."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._queue: deque[tuple[object, int]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._empty: asyncio.Future[None] | None = None
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, message: object, num_bytes: int = 0) -> None:
        if self._is_closed:
            return
        if not self._queue:
            try:
                if self._channel.offer(message, num_bytes):
                    return
            except ReplicaLost:
                self._is_closed = True
                return
        self._queue.append((message, num_bytes))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._send_all())

    async def flush(self) -> None:
        """Wait until the channel took everything, or closed."""
        if self._queue and not self._is_closed:
            if self._empty is None:
                self._empty = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._empty)

    def close(self) -> None:
        """Drop what still waits."""
        self._is_closed = True
        self._queue.clear()
        self._tell_empty()
        if self._task is not None:
            self._task.cancel()

    async def _send_all(self) -> None:
        queue, send = self._queue, self._channel.send
        try:
            while queue:
                await send(*queue[0])
                queue.popleft()
        except ReplicaLost:
            self._is_closed = True
            queue.clear()
        self._task = None
        self._tell_empty()

    def _tell_empty(self) -> None:
        if self._empty is not None and not self._empty.done():
            self._empty.set_result(None)
        self._empty = None
