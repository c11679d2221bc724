"""The last events that a person watching would want to see: what moved, what came and went, and why."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from penstock.core.events import Event
from penstock.core.ports import Log

KINDS = frozenset(("steered", "migrated", "scaled", "left"))
MOST = 50


class Recent:
    """Keeps MOST of them; `beside` makes a log that passes everything on and leaves them here too."""

    def __init__(self) -> None:
        self._kept: deque[Event] = deque(maxlen=MOST)

    def events(self) -> Sequence[Event]:
        return list(self._kept)

    def beside(self, log: Log) -> Log:
        return _Beside(log, self._kept)


class _Beside:
    def __init__(self, log: Log, kept: deque[Event]) -> None:
        self._emit, self._kept = log.emit, kept

    def emit(self, event: Event) -> None:
        self._emit(event)
        if event.kind in KINDS:
            self._kept.append(event)
