"""Processes that each work at one item at a time. One that dies loses only the item in its hands.

    map_in_processes(work, items, processes=4, on_result=...)

Rules
- Fresh interpreters (spawn): nothing of this process leaks into a result, and `work` must be importable by name.
- At most `processes` items are under way; the next is sent when one is done, so memory is bounded by that number.
- Each process has a pipe of its own. A pool shares one, and cannot say whose item killed which process.
- An item whose process died is tried once more in a new one; then it is Lost, with what ended the process.
- Ctrl-C reaches this process alone: workers never see it, they are killed on the way out.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from penstock.core.errors import PenstockError

A = TypeVar("A")
B = TypeVar("B")

TRIES = 2
STOP_TIMEOUT_S = 5.0
READY = "ready"


@dataclass(frozen=True, slots=True)
class Lost:
    """What became of an item whose processes died."""

    why: str


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def map_in_processes(
    work: Callable[[A], B],
    items: Sequence[A],
    *,
    processes: int,
    on_result: Callable[[int, B | Lost], None],
) -> None:
    """Call `on_result(index, result)` for every item, as they come. What `work` raises ends its process."""
    pickled = pickle.dumps(work)
    waiting = deque(range(len(items)))
    tries = [0] * len(items)
    crew = [_Worker(pickled) for _ in range(min(processes, len(items)))]
    try:
        while waiting or any(each.index is not None for each in crew):
            for each in crew:
                if each.is_ready and each.index is None and waiting:
                    given = waiting.popleft()
                    tries[given] += 1
                    each.send(given, items[given])
            for each in _that_spoke(crew):
                index, answer = each.receive()
                if isinstance(answer, Lost):
                    crew.remove(each)
                    if index is not None and tries[index] < TRIES:
                        waiting.appendleft(index)
                        index = None
                    if waiting:
                        crew.append(_Worker(pickled))
                if index is not None:
                    on_result(index, answer)  # type: ignore[arg-type]
        for each in crew:
            each.stop()
    finally:
        for each in crew:
            each.kill()


class _Worker:
    """One process and the item in its hands."""

    def __init__(self, pickled_work: bytes) -> None:
        context = multiprocessing.get_context("spawn")
        self.channel, theirs = context.Pipe()
        self.index: int | None = None
        self.is_ready = False
        self._process: BaseProcess = context.Process(target=_serve, args=(theirs, pickled_work))
        with _interrupts_held_back():
            self._process.start()
        theirs.close()

    def send(self, index: int, item: object) -> None:
        self.index = index
        try:
            self.channel.send(item)
        except OSError:
            pass  # it died while idle: receive() will say so

    def receive(self) -> tuple[int | None, object]:
        """The index and the answer to it; (None, READY) at first; (.., Lost) when the process is gone."""
        index, self.index = self.index, None
        try:
            answer = self.channel.recv()
        except (EOFError, OSError):
            self._process.join()
            lost = Lost(_ended_by(self._process.exitcode or 0))
            if not self.is_ready:
                raise PenstockError(
                    f"a worker could not start: {lost.why}",
                    hint="a script that uses several processes must do so under "
                    "`if __name__ == '__main__':`; one process works without",
                ) from None
            return index, lost
        self.is_ready = True
        return index, answer

    def stop(self) -> None:
        """Tell it that nothing more comes and wait for its end."""
        self.channel.close()
        self._process.join(STOP_TIMEOUT_S)

    def kill(self) -> None:
        self.channel.close()
        self._process.kill()
        self._process.join()


def _that_spoke(crew: Sequence[_Worker]) -> list[_Worker]:
    spoken = wait([each.channel for each in crew])
    return [each for each in crew if each.channel in spoken]


def _ended_by(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    told = "; the system kills so when memory runs out" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{told}"


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """A process started inside never sees Ctrl-C, not even while it loads; this one sees it a moment later."""
    resource_tracker.ensure_running()  # the start of it would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(channel: Connection, pickled_work: bytes) -> None:
    """The life of a worker: ends when the other side hangs up."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are spoken for
    work = pickle.loads(pickled_work)
    try:
        channel.send(READY)
        while True:
            channel.send(work(channel.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
