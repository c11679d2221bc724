"""Whether a replica that promised to speak every second still does.

A process that stands still (stopped, swapped out, stuck in a call that holds its interpreter) breaks no connection. So
its silence is counted, in looks that come TICKS times in `suspect_after_s`: after one more without a word it is
suspect and gets no new requests while another replica can take them; after `lost_after_s` it is given up, as if it
had died. A word clears it at once. Looks are counted rather than seconds, so that a listener who was itself held up
does not blame others for that: one late look is one.

What this does not see: a replica whose loop speaks while the thread that computes never ends its step.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

TICKS = 3
BEAT_S = 1.0  # what replicas promise


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds of silence."""

    suspect_after_s: float = 3.0
    lost_after_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.suspect_after_s < self.lost_after_s < math.inf:
            raise ValueError(
                "a replica must be suspect before it is given up: suspect_after_s and lost_after_s are "
                f"{self.suspect_after_s:g} and {self.lost_after_s:g}"
            )


class Silence:
    """`on_suspect` hears True and False in turns, `on_lost` once."""

    def __init__(
        self,
        patience: Patience,
        *,
        on_suspect: Callable[[bool], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._tick_s = patience.suspect_after_s / TICKS
        self._most = math.ceil(patience.lost_after_s / self._tick_s)
        self._on_suspect, self._on_lost = on_suspect, on_lost
        self._quiet = 0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        self._quiet = 0
        self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._look)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def hear(self) -> None:
        """It said something."""
        was, self._quiet = self._quiet, 0
        if was > TICKS:
            self._on_suspect(False)

    def _look(self) -> None:
        self._quiet += 1
        if self._quiet > self._most:
            self._timer = None
            self._on_lost(f"it said nothing for {self._most * self._tick_s:g} s")
            return
        self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._look)
        if self._quiet == TICKS + 1:
            self._on_suspect(True)
