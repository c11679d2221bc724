"""A virtual loop that calls somebody back after every callback: between two of them everything has to be in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import TypeVar, TypeVarTuple

from penstock.sim.loop import VirtualLoop

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class WatchedLoop(VirtualLoop):
    """`after` may raise, which ends the run like any other callback that raises.

    What is set is wrapped where it is set, so that the loop itself is the plain one.
    """

    def __init__(self, after: Callable[[], None]) -> None:
        super().__init__()
        self._after = after

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return super().call_at(when, self._watched, callback, args, context=context)

    def call_soon(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        return super().call_soon(self._watched, callback, args, context=context)

    def _watched(self, callback: Callable[[*Ts], object], args: tuple[*Ts]) -> None:
        callback(*args)
        self._after()

    def unwatch(self) -> None:
        self._after = _nothing

    def timers_left(self) -> list[str]:
        """What waits for its instant and was not cancelled."""
        left = [(when, timer) for when, _, timer in self._timers if not timer._cancelled]
        return [f"{_name(timer._args[0])} at {when:g} s" for when, timer in left]


def _name(callback: object) -> object:
    return getattr(callback, "__qualname__", callback)


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
