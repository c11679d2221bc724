"""What is due when: the part of the virtual loop that runs for every callback.

    ready     callbacks in their order, all of the instant that it is now
    timers    callbacks that wait for theirs; of equal instants the one that was set first goes first

A simulation is little else than callbacks, so they are kept in classes of this file and not in asyncio's, without its
checks for debugging: half the price. asyncio asks of a handle that it can be cancelled, and tells when it is due. What
is set without a context runs in the one that the loop runs in: copying one for each callback is for web frameworks,
whose tasks bring their own.

Long runs cancel many far timeouts: when most timers are cancelled ones, they are thrown out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextvars import Context
from heapq import heapify, heappop, heappush
from typing import ClassVar

PRUNE_AT = 256  # cancelled timers tolerated in the heap before it is rebuilt


class Soon:
    """A callback that is ready."""

    __slots__ = ("callback", "args", "context", "is_cancelled")
    _source_traceback: ClassVar[None] = None  # what asyncio fills when debugging

    def __init__(
        self, callback: Callable[..., object], args: tuple[object, ...], context: Context | None
    ) -> None:
        self.callback, self.args, self.context = callback, args, context
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled


class Timer(Soon):
    """A callback that waits for its instant; `is_set` while it does."""

    __slots__ = ("at", "agenda", "is_set")

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[object, ...],
        context: Context | None,
        at: float,
        agenda: Agenda,
    ) -> None:
        self.callback, self.args, self.context = callback, args, context
        self.is_cancelled = False
        self.at, self.agenda = at, agenda
        self.is_set = True

    def cancel(self) -> None:
        if not self.is_cancelled:
            self.is_cancelled = True
            if self.is_set:
                self.agenda.count_cancelled()

    def when(self) -> float:
        return self.at


class Agenda:
    """One loop's. `now` is its clock; `after` is called after every callback."""

    def __init__(self, start_at: float) -> None:
        self.now = start_at
        self.ready: deque[Soon] = deque()
        self.timers: list[tuple[float, int, Timer]] = []
        self.after: Callable[[], None] | None = None
        self.is_stopping = False
        self.is_closed = False
        self._num_set = 0
        self._num_cancelled = 0

    def time(self) -> float:
        return self.now

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: object,
        context: Context | None = None,
    ) -> Timer:
        if self.is_closed:
            raise RuntimeError("Event loop is closed")
        timer = Timer(callback, args, context, when, self)
        self._num_set += 1
        heappush(self.timers, (when, self._num_set, timer))
        return timer

    def call_soon(
        self, callback: Callable[..., object], *args: object, context: Context | None = None
    ) -> Soon:
        if self.is_closed:
            raise RuntimeError("Event loop is closed")
        handle = Soon(callback, args, context)
        self.ready.append(handle)
        return handle

    def run(self) -> bool:
        """Run until told to stop: what is ready in its order, and when nothing is, jump. False: nothing is left."""
        ready = self.ready
        while True:
            for _ in range(len(ready)):
                handle = ready.popleft()
                if handle.is_cancelled:
                    continue
                if handle.context is None:
                    handle.callback(*handle.args)
                else:
                    handle.context.run(handle.callback, *handle.args)
                if self.after is not None:
                    self.after()
            if self.is_stopping:
                self.is_stopping = False
                return True
            if not (ready or self._jump()):
                return False

    def _jump(self) -> bool:
        """Move the clock to the first live timer and make it, and all others that are due, ready."""
        ready = self.ready
        while self.timers:
            at, _, timer = heappop(self.timers)
            timer.is_set = False
            if timer.is_cancelled:
                self._num_cancelled -= 1
                continue
            if at > self.now:
                self.now = at
            ready.append(timer)
            break
        else:
            return False
        timers, now = self.timers, self.now
        while timers and timers[0][0] <= now:
            timer = heappop(timers)[2]
            timer.is_set = False
            if timer.is_cancelled:
                self._num_cancelled -= 1
            else:
                ready.append(timer)
        return True

    def count_cancelled(self) -> None:
        """Called once when a timer that waits is cancelled."""
        self._num_cancelled += 1
        if self._num_cancelled > PRUNE_AT and 2 * self._num_cancelled > len(self.timers):
            self.timers = [entry for entry in self.timers if not entry[2].is_cancelled]
            heapify(self.timers)
            self._num_cancelled = 0
