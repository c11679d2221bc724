"""An asyncio loop on which waiting takes no time.

When nothing is ready the clock jumps to exactly the instant of the next timer, so instants carry no accumulated
rounding: a timer set for 5.0 fires when `time()` is 5.0. The rules, each held by a test:

  - timers of equal instants fire in the order in which they were set (asyncio's own heap does not promise that);
  - a timer set in the past fires at once and never moves the clock back;
  - nothing ready and no timer set is a virtual deadlock: it is raised, with the names of the tasks that wait;
  - a callback that raises ends the run (plain asyncio logs it and goes on, and here that would end in a deadlock);
  - threads, sockets, pipes, signals and subprocesses live in real time and are refused by name.

The loop derives from asyncio's BaseEventLoop and replaces its `_run_once`, so it has no selector and no self-pipe. What
is due when is kept by sim.agenda. It leans on internals of CPython 3.11-3.14: `_ready`, `_run_once`, `_stopping`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import NoReturn, TypeVar, TypeVarTuple

from penstock.core.clock import announce
from penstock.sim.agenda import Agenda

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class VirtualLoop(asyncio.BaseEventLoop):
    """A loop whose clock starts at `start_at` and stands still while anything is ready."""

    def __init__(self, start_at: float = 0.0) -> None:
        super().__init__()
        self._agenda = agenda = Agenda(start_at)
        straight: dict[str, object] = {  # to the agenda, without a call in between
            "time": agenda.time,
            "call_at": agenda.call_at,
            "call_soon": agenda.call_soon,
            "_ready": agenda.ready,  # emptied by the base class when it is closed
        }
        vars(self).update(straight)

    def run_forever(self) -> None:
        announce(self)
        try:
            super().run_forever()
        finally:
            announce(None)

    def stop(self) -> None:
        super().stop()
        self._agenda.is_stopping = True

    def close(self) -> None:
        super().close()
        self._agenda.is_closed = True

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
        if not self._agenda.run():
            raise RuntimeError(self._deadlock())

    def _deadlock(self) -> str:
        waiting = sorted(_told(task) for task in asyncio.all_tasks(self) if not task.done())
        listed = "; ".join(waiting[:10]) + ("; ..." if len(waiting) > 10 else "")
        return (
            f"virtual deadlock at {self._agenda.now!r} s: nothing is ready and no timer is set, "
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
