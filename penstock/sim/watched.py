"""A virtual loop that calls somebody back after every callback: between two of them everything has to be in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import TypeVar

from penstock.sim.loop import VirtualLoop

T = TypeVar("T")


class WatchedLoop(VirtualLoop):
    """`after` may raise, which ends the run like any other callback that raises."""

    def __init__(self, after: Callable[[], None]) -> None:
        super().__init__()
        self._agenda.after = after

    def unwatch(self) -> None:
        self._agenda.after = None

    def timers_left(self) -> list[str]:
        """What waits for its instant and was not cancelled."""
        return [
            f"{getattr(timer.callback, '__qualname__', timer.callback)} at {when:g} s"
            for when, _, timer in self._agenda.timers
            if not timer.is_cancelled
        ]


def run_watched(main: Coroutine[object, object, T], loop: WatchedLoop) -> T:
    """`sim.loop.run` on a loop of one's own. A run that raised leaves tasks behind, whose ends nobody wants to know."""
    runner = asyncio.Runner(loop_factory=lambda: loop)
    try:
        return runner.run(main)
    finally:
        loop.unwatch()
        with contextlib.suppress(Exception, asyncio.CancelledError):
            runner.close()
