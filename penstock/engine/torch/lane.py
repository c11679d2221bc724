"""One lane: a thread that runs steps, one at a time, and can leave one in the middle to run another.

A step is a generator that yields after every piece of its forward and returns its outputs. All state that steps
touch belongs to this thread; the loop's thread sends commands through a queue and hears back through
`call_soon_threadsafe`. Interrupts and aborts are marks that the thread reads between pieces; kernels that run many on
end are told of them by the thread's `Halt`. An exception ends the step it arose in, and no other.

An interrupt is obeyed after the piece that runs: the attention block or the MLP of one layer. A step that was left
holds its activations (`Piece.held_bytes`) and nothing else but its job's blocks; they are gone with its abort. On a GPU
pieces are queued, not awaited: there an interrupt stops the queueing, and what is queued runs to its end.

On a machine of few cores the HTTP process, the loop's thread and the lane compete. A lane may step back (`niceness`):
it and its threads then use what the others leave, which is nearly all, and are preempted at once when those have
something to do.

Where several lanes share the cores of one machine each has a `Seat` (cores.py), which it takes with its plan's share
before the plan begins or goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections.abc import Callable, Generator
from typing import Literal, NamedTuple

import torch

from penstock.core.errors import PenstockError
from penstock.core.plans import Done, Plan, Sampled, Yielded
from penstock.core.types import PlanId
from penstock.engine.torch.cores import Seat, compute_with
from penstock.engine.torch.decoder import Piece
from penstock.engine.torch.kernels.program import Halt

logger = logging.getLogger(__name__)
Mark = Literal["layer", "operator", "abort"]


Step = Generator[Piece, None, tuple[Sampled, ...]]


class Launch(NamedTuple):
    plan: Plan


class Resume(NamedTuple):
    plan: PlanId


class Abort(NamedTuple):
    """`left` is set once nothing of the plan runs any more."""

    plan: PlanId
    left: threading.Event | None = None


class Close(NamedTuple):
    seqs: tuple[int, ...]


Command = Launch | Resume | Abort | Close


class Begun(NamedTuple):
    """A step under way, and the share it runs with."""

    step: Step
    share: float


class Lane:
    """See the module's text. `run` makes a step of a plan, `close` drops jobs; both run on the thread.

    `threads`: of torch, for a lane that has the machine to itself; None leaves them alone.
    """

    def __init__(
        self,
        *,
        run: Callable[[Plan], Step],
        close: Callable[[tuple[int, ...]], None],
        tell: Callable[[Done | Yielded], None],
        threads: int | None,
        seat: Seat | None = None,
        niceness: int = 0,
    ) -> None:
        self._run, self._close, self._tell = run, close, tell
        self._threads, self._seat, self._niceness = threads, seat, niceness
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._marks: dict[PlanId, Mark] = {}
        self._halt = Halt()  # set while there may be a mark of the plan that runs
        self._left: dict[PlanId, Begun] = {}  # interrupted
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._main, name="penstock-lane", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._inbox.put(command)

    def mark(self, plan: PlanId, mark: Mark) -> None:
        if self._marks.get(plan) != "abort":
            self._marks[plan] = mark
            self._halt.set(True)

    def unmark(self, plan: PlanId) -> None:
        self._marks.pop(plan, None)

    async def stop(self, running: tuple[PlanId, ...]) -> None:
        """End the thread after the piece it is in."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        for plan in running:
            self.mark(plan, "abort")
        self._inbox.put(None)
        if self._thread.is_alive():
            await self._ended.wait()
            self._thread.join()

    def _main(self) -> None:
        self._halt.bind()
        if self._niceness:
            step_back(self._niceness)
        if self._threads is not None:
            compute_with(self._threads)
        with torch.inference_mode():
            while (command := self._inbox.get()) is not None:
                self._obey(command)
            for left in self._left.values():
                left.step.close()
        if self._ended is not None:
            self._call(self._ended.set)

    def _obey(self, command: Command) -> None:
        match command:
            case Launch(plan):
                self._advance(plan.id, Begun(self._run(plan), plan.share))
            case Resume(plan_id):
                left = self._left.pop(plan_id, None)
                if left is not None:
                    self._advance(plan_id, left)
            case Abort(plan_id, is_over):
                left = self._left.pop(plan_id, None)
                if left is not None:
                    left.step.close()
                self._marks.pop(plan_id, None)
                if is_over is not None:
                    is_over.set()
            case Close(seqs):
                self._close(seqs)

    def _advance(self, plan: PlanId, begun: Begun) -> None:
        """Run a step to its end, or to the boundary at which it shall stop."""
        told: Done | Yielded | None = None
        step = begun.step
        self._halt.set(False)
        if self._marks:  # looked at after: a mark that comes now sets it again
            self._halt.set(True)
        try:
            if self._seat is not None:
                self._seat.take(begun.share)
            while True:
                piece = next(step)
                mark = self._marks.get(plan)
                if mark == "abort":
                    step.close()
                    break
                if mark == "operator" or (mark == "layer" and piece.ends_layer):
                    self._left[plan] = begun
                    told = Yielded(plan, 0.0, piece.held_bytes)
                    break
        except StopIteration as end:
            told = Done(plan, 1, end.value, ())
        except Exception as error:  # noqa: BLE001 - the outermost loop here: a step may fail, the lane not
            told = Done(plan, 1, (), (), error=describe(error))
        self._marks.pop(
            plan, None
        )  # first: whoever hears of a stop may ask for the next one at once
        if told is not None:
            self._report(told)

    def _report(self, told: Done | Yielded) -> None:
        self._call(self._tell, told)

    def _call(self, what: Callable[..., None], *args: Done | Yielded) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(what, *args)
        except RuntimeError:  # the loop is closed: nobody listens any more
            pass


def step_back(niceness: int) -> None:
    """Lower the calling thread's priority, and with it that of the OpenMP threads it will start."""
    try:
        here = threading.get_native_id()
        niceness = max(niceness, os.getpriority(os.PRIO_PROCESS, here))  # root could come forward
        os.setpriority(os.PRIO_PROCESS, here, niceness)
    except (
        AttributeError,
        OSError,
    ) as error:  # not Linux; or niced further from outside, and that cannot be undone
        logger.info("the lane keeps its priority: %s", error)


def describe(error: BaseException) -> str:
    """What a caller is told of a failed step."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "the step ran out of memory; try again, or give the engine fewer blocks or smaller batches"
    if isinstance(error, PenstockError):
        return error.message
    first = str(error).strip().splitlines() or ["no further detail"]
    return f"the step failed: {type(error).__name__}: {first[0]}"
