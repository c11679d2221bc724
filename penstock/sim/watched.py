"""A virtual loop that calls somebody back after every callback: between two of them everything has to be in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from penstock.sim.loop import VirtualLoop

T = TypeVar("T")


class WatchedLoop(VirtualLoop):
    """`after` may raise, which ends the run like any other callback that raises."""

    def __init__(self, after: Callable[[], None]) -> None:
        super().__init__()
        self._after = after

    def _run_once(self) -> None:
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
                self._after()
            if self._stopping:
                return
            if not ready:
                jump()

    def unwatch(self) -> None:
        self._after = _nothing

    def timers_left(self) -> list[str]:
        """What waits for its instant and was not cancelled."""
        return [
            f"{getattr(timer._callback, '__qualname__', timer._callback)} at {when:g} s"
            for when, _, timer in self._timers
            if not timer._cancelled
        ]


def _nothing() -> None: ...


def run_watched(main: Coroutine[object, object, T], loop: WatchedLoop) -> T:
    """`sim.loop.run` on a loop of one's own. A run that raised leaves tasks behind, whose ends nobody wants to know."""
    runner = asyncio.Runner(loop_factory=lambda: loop)
    try:
        return runner.run(main)
    finally:
        loop.unwatch()
        with contextlib.suppress(Exception, asyncio.CancelledError):
            runner.close()
