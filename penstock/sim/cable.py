"""A modelled link on which things go wrong, as they do on the real ones.

Both real channels keep their promise (whole messages, in order, each once, or the channel is closed), so nothing here
breaks it either: what a network does to a connection shows itself as time, or as its end.

    delay       messages take longer for a while; those behind wait, since order is kept
    stand still an end is a process that is stopped: it hears nothing and what it sends leaves when it goes on
    cut         the connection is lost in the middle of what is under way: each direction delivers some of its messages,
                the next one was written in part and is dropped by the receiver, and all behind it are lost. The ends
                hear of it at different instants; until then what they send is taken and lost (half-open)
    kill        a cut of which one end hears nothing, because it is no more

A message that is dropped, doubled or out of order on a connection cannot happen on either of them; what a network that
reconnects would make of it is a cut, and a new connection afterwards. A message from an old connection that comes after
the first one of the new is possible, and nothing keeps it from happening here.

`alter` sees what the far end sends and may change it or hold it back (None): reports only, which a busy process may
leave out and whose clock may be wrong.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable

from penstock.core.errors import ReplicaLost

Alter = Callable[[object], object | None]
CLOSED = "the peer closed the channel"


class _End:
    """Behind the last message that arrives: why there are no more."""

    def __init__(self, why: str) -> None:
        self.why = why


class CableEnd:
    """One end; a core.ports.Channel. `Cable` makes two."""

    def __init__(self, cable: Cable, limit: int) -> None:
        self.cable, self._limit = cable, limit
        self.peer: CableEnd = self
        self._inbox: deque[tuple[float, object]] = deque()
        self._last_at = -math.inf  # when the last message sent from here arrives
        self.still_until = -math.inf
        self.delay_s, self.delay_until = 0.0, -math.inf
        self.alter: Alter | None = None
        self._on_message: Callable[[object], None] | None = None
        self._on_closed: Callable[[str], None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.is_closed = False
        self.is_over = False  # it heard the end of it

    @property
    def num_coming(self) -> int:
        return len(self._inbox)

    # ---------------------------------------------------------------- core.ports.Channel

    async def send(self, message: object, num_bytes: int = 0) -> None:
        while not self.offer(message, num_bytes):
            peer = self.peer
            if peer._room is None or peer._room.done():
                peer._room = asyncio.get_running_loop().create_future()
            await asyncio.shield(peer._room)

    def offer(self, message: object, num_bytes: int = 0) -> bool:
        if self.is_closed or self.is_over or (self.peer.is_closed and not self.cable.is_cut):
            raise ReplicaLost("the channel is closed")
        if self.cable.is_cut:
            return True  # taken, and lost
        if len(self.peer._inbox) >= self._limit:
            return False
        if self.alter is not None:
            changed = self.alter(message)
            if changed is None:
                return True
            message = changed
        self._put(self.cable.copied(message))
        return True

    def listen(self, on_message: Callable[[object], None]) -> None:
        self._on_message = on_message
        self._schedule()

    def watch(self, on_closed: Callable[[str], None]) -> None:
        self._on_closed = on_closed
        self._schedule()

    async def close(self) -> None:
        if self.is_closed:
            return
        self.die()
        self._wake()
        self.peer._wake()
        if not self.cable.is_cut:
            self._put(_End(CLOSED))

    # ---------------------------------------------------------------- what goes wrong

    def die(self) -> None:
        """Hear and send nothing from now on."""
        self.is_closed = True
        self._inbox.clear()
        self._on_message = self._on_closed = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def stand_still(self, until: float) -> None:
        self.still_until = max(self.still_until, until)
        self._reschedule()

    def lose(self, num_kept: int, why: str, at: float) -> None:
        """Of what is under way to this end the first `num_kept` messages arrive; the end is known at `at`."""
        if self.is_closed or self.is_over:
            return
        while len(self._inbox) > num_kept:
            self._inbox.pop()
        last_at = self._inbox[-1][0] if self._inbox else at
        self._inbox.append((max(at, last_at), _End(why)))
        self._wake()
        self._reschedule()

    # ---------------------------------------------------------------- inside

    def _put(self, message: object) -> None:
        if self.peer.is_closed:
            return
        at = asyncio.get_running_loop().time()
        leaves_at = max(at, self.still_until)
        slow_s = self.delay_s if at < self.delay_until else 0.0
        self._last_at = max(self._last_at, leaves_at + self.cable.latency_s + slow_s)
        self.peer._inbox.append((self._last_at, message))
        self.peer._schedule()

    def _schedule(self) -> None:
        if self._timer is None and self._inbox and self._on_message is not None:
            due = max(self._inbox[0][0], self.still_until)
            self._timer = asyncio.get_running_loop().call_at(due, self._deliver)

    def _reschedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._schedule()

    def _deliver(self) -> None:
        self._timer = None
        at = asyncio.get_running_loop().time()
        inbox = self._inbox
        try:
            while inbox and not self.is_closed and max(inbox[0][0], self.still_until) <= at:
                message = inbox[0][1]
                if isinstance(message, _End):
                    if self._on_closed is None:
                        return  # told to the first who watches
                    inbox.clear()
                    self.is_over = True
                    on_closed, self._on_closed = self._on_closed, None
                    on_closed(message.why)
                    return
                inbox.popleft()
                assert self._on_message is not None
                self._on_message(message)
        finally:
            self._wake()
            if inbox and not isinstance(inbox[0][1], _End):
                self._schedule()
            elif inbox and max(inbox[0][0], self.still_until) > at:
                self._schedule()

    def _wake(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)


class Cable:
    """Both ends of a connection. Needs a running loop. `copied` is what a message becomes on its way (a codec)."""

    def __init__(
        self,
        *,
        latency_s: float = 0.0,
        limit: int = 4096,
        copied: Callable[[object], object] = lambda message: message,
    ) -> None:
        self.latency_s, self.copied = latency_s, copied
        self.is_cut = False
        self.near, self.far = CableEnd(self, limit), CableEnd(self, limit)
        self.near.peer, self.far.peer = self.far, self.near

    def delay(self, seconds: float, until: float) -> None:
        for end in (self.near, self.far):
            end.delay_s, end.delay_until = seconds, until

    def cut(self, *, kept: tuple[int, int], told_at: tuple[float, float], why: str) -> None:
        """`kept`: messages that still arrive at the near and at the far end; `told_at`: when these hear of it."""
        if self.is_cut or self.near.is_closed or self.far.is_closed:
            return
        self.is_cut = True
        self.near.lose(kept[0], why, told_at[0])
        self.far.lose(kept[1], why, told_at[1])

    def kill(self, end: CableEnd, *, kept: int, told_at: float, why: str) -> None:
        """The process at this end is gone; the other one hears of it."""
        if not self.is_cut:
            self.is_cut = True
            end.peer.lose(kept, why, told_at)
        end.die()
        end._wake()
