"""What images cost an answer before its first token, for `report.explain`: waiting for the tower, the tower, the way.

Images that are encoded in the step that computes their prompt are a part of that step, and not told apart.
"""

from __future__ import annotations

from penstock.report.lives import Flight, Life, Watched


def encoded(watched: Watched, flight: Flight, start: float, end: float) -> None:
    """A step has encoded images of some who wait."""
    for seq in flight.images:
        life = watched.lives.get(seq)
        if life is not None and not life.is_running:
            life.book("encode-queue", start)
            life.book("encode", end)
            life.waited_at = watched.waited


class HandedOn:
    """Requests with images that go on at another replica, and where their time went at those before."""

    def __init__(self) -> None:
        self._left: dict[str, tuple[dict[str, float], dict[str, float] | None]] = {}

    def parted(self, life: Life, at: float) -> None:
        life.book("elsewhere" if life.has_output else "encode-queue", at)
        self._left[life.event.request] = dict(life.parts), life.first_parts

    def landed(self, life: Life) -> None:
        """All that was before is booked as "elsewhere" so far: say what it was."""
        parts, first_parts = self._left.pop(life.event.request, ({}, None))
        way_s = life.parts.get("elsewhere", 0.0) - sum(parts.values())
        if not parts or way_s < 0:
            return  # logs that do not know of each other's beginnings
        life.parts["elsewhere"] = 0.0
        for cause, seconds in parts.items():
            life.parts[cause] += seconds
        life.parts["elsewhere" if life.has_output else "transfer"] += way_s
        if first_parts is not None:
            life.first_parts = first_parts

    def forget(self, request: str) -> None:
        self._left.pop(request, None)
