"""An asyncio loop on which waiting takes no time.

When nothing is ready the clock jumps to exactly the instant of the next timer, so instants carry no accumulated
rounding: a timer set for 5.0 fires when `time()` is 5.0. The rules, each held by a test:

  - timers of equal instants fire in the order in which they were set (asyncio's own heap does not promise that);
  - a timer set in the past fires at once and never moves the clock back;
  - nothing ready and no timer set is a virtual deadlock: it is raised, with the names of the tasks that wait;
  - a callback that raises ends the run (plain asyncio logs it and goes on, and here that would end in a deadlock);
  - threads, sockets, pipes, signals and subprocesses live in real time and are refused by name.

The loop derives from asyncio's BaseEventLoop and replaces its `_run_once`, so it has no selector and no self-pipe. A
simulation is little else than callbacks, so handles are made here, with asyncio's fields and without its checks for
debugging: half the price. What is set without a context runs in the one that the loop runs in: copying one for each
callback is for web frameworks, whose tasks bring their own. It leans on internals of CPython 3.11-3.14: `_ready`,
`_run_once`, `_stopping`, `_closed` and the fields of handles.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from heapq import heapify, heappop, heappush
from typing import Any, NoReturn, TypeVar, TypeVarTuple

from penstock.core.clock import announce

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

PRUNE_AT = 256  # cancelled timers tolerated in the heap before it is rebuilt


class _Soon(asyncio.Handle):
    """A callback that is ready."""

    __slots__ = ()
    _source_traceback = _repr = None  # what asyncio fills when debugging

    def __init__(
        self, callback: Callable[..., object], args: tuple[object, ...], context: Context | None
    ) -> None:
        self._callback, self._args = callback, args
        self._context = context
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True


class _Timer(asyncio.TimerHandle):
    """A callback that waits for its instant; `_scheduled` while it does."""

    __slots__ = ()
    _source_traceback = _repr = None

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[object, ...],
        loop: VirtualLoop,
        context: Context | None,
    ) -> None:
        self._when, self._callback, self._args, self._loop = when, callback, args, loop
        self._context = context
        self._cancelled = False
        self._scheduled = True

    def cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            if self._scheduled:
                self._loop._count_cancelled()


class VirtualLoop(asyncio.BaseEventLoop):
    """A loop whose clock starts at `start_at` and stands still while anything is ready."""

    _ready: deque[asyncio.Handle]
    _stopping: bool
    _closed: bool

    def __init__(self, start_at: float = 0.0) -> None:
        super().__init__()
        self._now = start_at
        self._timers: list[tuple[float, int, _Timer]] = []
        self._num_set = 0
        self._num_cancelled = 0

    def run_forever(self) -> None:
        announce(self)
        try:
            super().run_forever()
        finally:
            announce(None)

    def time(self) -> float:
        return self._now

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        timer = _Timer(when, callback, args, self, context)
        self._num_set = number = self._num_set + 1
        heappush(self._timers, (when, number, timer))
        return timer

    def call_soon(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        handle = _Soon(callback, args, context)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """For the loop's own thread only: asyncio.Runner's Ctrl-C handling comes this way."""
        owner = getattr(self, "_thread_id", None)
        if owner is not None and owner != threading.get_ident():
            raise RuntimeError("another thread called into virtual time: use a modelled leaf")
        return self.call_soon(callback, *args, context=context)

    def _run_once(self) -> None:
        """Run until told to stop: what is ready in its order, and when nothing is, jump."""
        ready, jump = self._ready, self._jump
        handle: Any  # with fields that asyncio does not tell of
        while True:
            for _ in range(len(ready)):
                handle = ready.popleft()
                if handle._cancelled:
                    continue
                if handle._context is None:
                    handle._callback(*handle._args)
                else:
                    handle._context.run(handle._callback, *handle._args)
            if self._stopping:
                return
            if not ready:
                jump()

    def _jump(self) -> None:
        """Move the clock to the first live timer and make it, and all others that are due, ready."""
        ready = self._ready
        while self._timers:
            at, _, timer = heappop(self._timers)
            timer._scheduled = False
            if timer._cancelled:
                self._num_cancelled -= 1
                continue
            if at > self._now:
                self._now = at
            ready.append(timer)
            break
        else:
            raise RuntimeError(self._deadlock())
        timers, at = self._timers, self._now
        while timers and timers[0][0] <= at:
            timer = heappop(timers)[2]
            timer._scheduled = False
            if timer._cancelled:
                self._num_cancelled -= 1
            else:
                ready.append(timer)

    def _count_cancelled(self) -> None:
        """Called once when a timer that waits is cancelled. Long runs cancel many far timeouts."""
        self._num_cancelled += 1
        if self._num_cancelled > PRUNE_AT and 2 * self._num_cancelled > len(self._timers):
            self._timers = [entry for entry in self._timers if not entry[2]._cancelled]
            heapify(self._timers)
            self._num_cancelled = 0

    def _deadlock(self) -> str:
        waiting = sorted(_told(task) for task in asyncio.all_tasks(self) if not task.done())
        listed = "; ".join(waiting[:10]) + ("; ..." if len(waiting) > 10 else "")
        return (
            f"virtual deadlock at {self._now!r} s: nothing is ready and no timer is set, "
            f"but {len(waiting)} task(s) wait: {listed or 'none'}"
        )

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise RuntimeError(
            "threads, sockets, pipes, signals and subprocesses do not exist in virtual time: "
            "use a modelled leaf"
        )

    run_in_executor = _refuse
    getaddrinfo = getnameinfo = _refuse
    add_reader = remove_reader = add_writer = remove_writer = _refuse
    add_signal_handler = remove_signal_handler = _refuse
    create_connection = create_server = create_datagram_endpoint = _refuse
    create_unix_connection = create_unix_server = _refuse
    connect_accepted_socket = sendfile = start_tls = _refuse
    sock_recv = sock_recv_into = sock_recvfrom = sock_recvfrom_into = _refuse
    sock_sendall = sock_sendto = sock_connect = sock_accept = sock_sendfile = _refuse
    connect_read_pipe = connect_write_pipe = subprocess_exec = subprocess_shell = _refuse


def _told(task: asyncio.Task[object]) -> str:
    code = getattr(task.get_coro(), "__qualname__", "?")
    stack = task.get_stack(limit=1)
    place = f" at {stack[0].f_code.co_filename}:{stack[0].f_lineno}" if stack else ""
    return f"{task.get_name()} ({code}{place})"


def run(main: Coroutine[object, object, T], *, start_at: float = 0.0) -> T:
    """Run a coroutine to its end in virtual time, like asyncio.run."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(start_at)) as runner:
        return runner.run(main)
