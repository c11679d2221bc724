"""Requests that no replica could take, until the route policy is asked about them again: first come, first asked.

The first is asked about after the time that the policy said, and as soon as some request has ended. Whoever comes
meanwhile stands behind the others without asking, so that nobody takes the place that somebody waited for.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.cluster.ticket import Ticket


class Waiting:
    """One fleet's; `place` asks about a ticket."""

    def __init__(self, place: Callable[[Ticket], None]) -> None:
        self._place = place
        self._waits: OrderedDict[str, Ticket] = OrderedDict()
        self._again_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waits)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waits

    def add(self, ticket: Ticket, again_s: float | None = None) -> None:
        """Whoever has been asked about before stays before those that came later. None: as the policy said last."""
        self._again_s = again_s or self._again_s
        self._waits[ticket.request.id] = ticket
        if ticket.has_waited:
            self._waits.move_to_end(ticket.request.id, last=False)
        ticket.tried, ticket.has_waited = (), True
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._again_s, self._ask_on_time)

    def drop(self, request_id: str) -> bool:
        """Whether it waited."""
        return self._waits.pop(request_id, None) is not None

    def ask_for_oldest(self) -> None:
        if self._waits:
            _, ticket = self._waits.popitem(last=False)
            self._place(ticket)

    def _ask_on_time(self) -> None:
        self._timer = None
        self.ask_for_oldest()
        if self._waits and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._again_s, self._ask_on_time)
