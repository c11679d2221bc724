"""Device processes as the replica's process sees them: started, told, asked for work, replaced.

A standby is a process that has loaded its programs and holds nothing; one becomes a device in the time of a message.
Starting one takes seconds, so as many as were asked for are kept ready, and new ones start behind those that left.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle

from penstock.core.errors import BadModel, StepFailed
from penstock.engine.torch.elastic.orders import Order

PROGRAM = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[2]); "
    "from penstock.engine.torch.elastic.device import main_of; main_of(sys.argv[1])"
)
START_S = 120.0  # until a process that was just started answers
ANSWER_S = 600.0  # a device that says nothing for so long counts as dead
GONE = (EOFError, OSError)


class DeviceGone(Exception):
    """A device process ended, or does not answer."""


@dataclass(slots=True, eq=False)
class Worker:
    """One process and the two lines to it."""

    child: subprocess.Popen[bytes]
    orders: Connection
    work: Connection
    is_ready: bool = False

    def await_ready(self) -> None:
        """Raises DeviceGone."""
        if not self.is_ready:
            self._hear(START_S)
            self.is_ready = True

    def tell(self, order: Order, *handles: int) -> None:
        """Send an order without waiting for the answer. Raises DeviceGone."""
        try:
            self.orders.send(order)
            for handle in handles:
                send_handle(self.orders, handle, self.child.pid)
        except GONE:
            raise DeviceGone(self.ending()) from None

    def hear(self) -> None:
        """The answer to an order. Raises DeviceGone, BadModel."""
        error = self._hear(ANSWER_S)
        if error is not None:
            message, hint = error
            raise BadModel(f"a device process cannot take its experts: {message}", hint=hint)

    def _hear(self, seconds: float) -> tuple[str, str] | None:
        try:
            if not self.orders.poll(seconds):
                raise DeviceGone(f"it did not answer for {seconds:g} s")
            found: tuple[str, str] | None = self.orders.recv()
            return found
        except GONE:
            raise DeviceGone(self.ending()) from None

    def ask(self, message: bytes) -> None:
        """Raises DeviceGone."""
        try:
            self.work.send_bytes(message)
        except GONE:
            raise DeviceGone(self.ending()) from None

    def answer(self) -> None:
        """Of the work asked for. Raises DeviceGone, StepFailed."""
        try:
            if not self.work.poll(ANSWER_S):
                raise DeviceGone(f"it did not answer for {ANSWER_S:g} s")
            error = self.work.recv_bytes()
        except GONE:
            raise DeviceGone(self.ending()) from None
        if error:
            raise StepFailed(f"a device process failed: {error.decode(errors='replace')}")

    def ending(self) -> str:
        try:
            return f"it ended with exit code {self.child.wait(1.0)}"
        except subprocess.TimeoutExpired:
            return "its line was closed"

    def end(self) -> None:
        """Its lines are closed when nobody has them any more: another thread may listen there."""
        self.child.kill()
        self.child.wait()


class Standbys:
    """Processes that wait to be devices."""

    def __init__(self, told: dict[str, str], count: int) -> None:
        self._told, self._count = told, count
        self._waiting: deque[Worker] = deque()
        self._guard = threading.Lock()
        self._is_closed = False

    def start(self, more: int = 0) -> None:
        """As many as are to wait, and `more`."""
        with self._guard:
            while len(self._waiting) < self._count + more and not self._is_closed:
                self._waiting.append(self._spawn())

    def wake(self) -> Worker:
        """One that is ready; another one is started if none waits. Raises DeviceGone."""
        with self._guard:
            if self._is_closed:
                raise DeviceGone("the model is being closed")
            found = self._waiting.popleft() if self._waiting else self._spawn()
        try:
            found.await_ready()
        except DeviceGone:
            found.end()
            raise
        return found

    def give(self, worker: Worker) -> None:
        """One that is needed no more: it waits, unless enough do."""
        with self._guard:
            if len(self._waiting) < self._count and not self._is_closed:
                self._waiting.appendleft(worker)
                return
        worker.end()

    @property
    def pids(self) -> list[int]:
        return [each.child.pid for each in self._waiting]

    def close(self) -> None:
        with self._guard:
            self._is_closed = True
            waiting, self._waiting = list(self._waiting), deque()
        for each in waiting:
            each.end()

    def _spawn(self) -> Worker:
        orders, far_orders = Pipe()
        work, far_work = Pipe()
        told = {"told": self._told, "orders": far_orders.fileno(), "work": far_work.fileno()}
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(told), json.dumps(sys.path)],
            stdin=subprocess.DEVNULL,
            pass_fds=(far_orders.fileno(), far_work.fileno()),
        )
        far_orders.close()
        far_work.close()
        return Worker(child, orders, work)
