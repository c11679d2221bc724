"""A channel over calls: one end can only be called, so the other pushes frames to it and asks it for its own.

    near end   Polled     push(frames) is called with what was sent, one call at a time; pull() again and again
    far end    Mailbox    hear(frames) is what push calls, take() what pull calls: it waits until there is something

Frames are whole and in order since no call is begun before the one before it returned. What was sent while a call was
under way goes in one batch with the next. A call that raises ends the channel; no frames, pushed or taken, are the word
that the other end closed it. Memory: at most LIMIT frames wait at each end, then `send` waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from penstock.core.errors import PenstockError, ReplicaLost
from penstock.net.codec import Codec

LIMIT = 4096
Push = Callable[[list[bytes]], Awaitable[object]]
Pull = Callable[[], Awaitable[list[bytes]]]


class _Ends:
    """What both ends do: frames out through a bounded list, messages in through whoever listens."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._out: list[bytes] = []
        self._in: list[bytes] = []  # before anybody listens
        self._on_message: Callable[[object], None] | None = None
        self._on_closed: Callable[[str], None] | None = None
        self._end: str | None = None
        self._filled = asyncio.Event()  # there is something to carry, or the end
        self._emptied = asyncio.Event()

    async def send(self, message: object, num_bytes: int = 0) -> None:
        while not self.offer(message, num_bytes):
            self._emptied.clear()
            await self._emptied.wait()

    def offer(self, message: object, num_bytes: int = 0) -> bool:
        if self._end is not None:
            raise ReplicaLost(f"the channel is closed: {self._end}")
        if len(self._out) >= LIMIT:
            return False
        self._out.append(self._codec.encode(message))
        self._filled.set()
        return True

    def listen(self, on_message: Callable[[object], None]) -> None:
        self._on_message = on_message
        asyncio.get_running_loop().call_soon(self._hand_over)

    def watch(self, on_closed: Callable[[str], None]) -> None:
        self._on_closed = on_closed
        if self._end is not None:
            asyncio.get_running_loop().call_soon(self._tell)

    def _grab(self) -> list[bytes]:
        frames, self._out = self._out, []
        self._filled.clear()
        self._emptied.set()
        return frames

    def _arrive(self, frames: list[bytes]) -> None:
        self._in += frames
        self._hand_over()

    def _hand_over(self) -> None:
        while self._in and self._on_message is not None:
            try:
                message = self._codec.decode(self._in.pop(0))
            except PenstockError as error:
                self._shut(f"it sent what cannot be read: {error}")
                return
            self._on_message(message)
        if self._end is not None:
            self._tell()

    def _shut(self, why: str) -> None:
        if self._end is None:
            self._end = why
            self._filled.set()
            self._emptied.set()
        self._tell()

    def _tell(self) -> None:
        on_closed = self._on_closed
        if on_closed is not None and (not self._in or self._on_message is None):
            self._on_closed = None
            assert self._end is not None
            on_closed(self._end)


class Polled(_Ends):
    """The near end; it works from when it is made, inside a running loop."""

    def __init__(self, codec: Codec, push: Push, pull: Pull) -> None:
        super().__init__(codec)
        self._push, self._pull = push, pull
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._push_all()), loop.create_task(self._pull_all())]

    async def close(self) -> None:
        """What was sent before is still carried."""
        self._on_message = self._on_closed = None
        self._end = self._end or "this end closed it"
        self._filled.set()
        self._emptied.set()
        self._tasks[1].cancel()
        await asyncio.wait(self._tasks)

    async def _push_all(self) -> None:
        try:
            while self._out or self._end is None:
                await self._filled.wait()
                frames = self._grab()
                if frames:
                    await self._push(frames)
            await self._push([])
        except PenstockError as error:
            self._out.clear()
            self._shut(error.message)

    async def _pull_all(self) -> None:
        try:
            while self._end is None:
                frames = await self._pull()
                if not frames:
                    self._shut("the peer closed the channel")
                    return
                self._arrive(frames)
        except PenstockError as error:
            self._shut(error.message)


class Mailbox(_Ends):
    """The far end."""

    def hear(self, frames: list[bytes]) -> None:
        if self._end is not None:
            return
        if frames:
            self._arrive(frames)
        else:
            self._shut("the peer closed the channel")

    async def take(self) -> list[bytes]:
        """What was sent since; nothing when the channel is closed."""
        await self._filled.wait()
        frames = self._grab()
        if self._end is not None:
            self._filled.set()
        return frames

    async def close(self) -> None:
        self._on_message = self._on_closed = None
        self._end = self._end or "this end closed it"
        self._filled.set()
        self._emptied.set()
