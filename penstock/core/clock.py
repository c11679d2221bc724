"""Time is the running loop: on a wall-clock loop seconds pass, on a virtual one waiting takes no time.

Nothing else in the project imports `time` to decide anything; see the lint rule in pyproject.toml.
"""

from __future__ import annotations

import asyncio
import time

from penstock.core.virtual import VIRTUAL


def announce(loop: asyncio.AbstractEventLoop | None) -> None:
    """A virtual loop begins to run in this thread, or (None) has stopped."""
    VIRTUAL.loop = loop


def running_loop() -> asyncio.AbstractEventLoop:
    """asyncio.get_running_loop(), quicker in virtual time."""
    return VIRTUAL.loop or asyncio.get_running_loop()


def now() -> float:
    """Seconds of the running loop's clock. Only differences mean something."""
    return (VIRTUAL.loop or asyncio.get_running_loop()).time()


async def sleep_until(at: float) -> None:
    """Wait until the running loop's clock reads `at`; return at once when it already does."""
    delay = at - now()
    if delay > 0:
        await asyncio.sleep(delay)


def wall_anchor() -> tuple[float, float]:
    """(loop seconds, Unix seconds) of one instant, to place a log in the world and to merge logs of hosts."""
    return now(), time.time()
