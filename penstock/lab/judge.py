"""Compares what a replayed mechanism writes with what its log holds, event by event, whole."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from penstock.core.events import Event, Header, Routed, Stepped

DECISIONS = (Stepped, Routed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where a replay left its log. `fields` are those of the two events that differ; an absent event is None."""

    who: str
    number: int  # of the decision, from 1
    recorded: Event | None
    replayed: Event | None
    fields: tuple[str, ...] = ()
    failure: str = ""

    def __str__(self) -> str:
        lines = [f"{self.who}: decision {self.number} differs"]
        if self.failure:
            lines.append(f"  the replay failed: {self.failure}")
        for name, event in (("recorded", self.recorded), ("replayed", self.replayed)):
            if event is None:
                lines.append(f"  {name}: nothing")
            else:
                at = event.loop_at if isinstance(event, Header) else event.at
                shown = ", ".join(f"{field}={getattr(event, field)!r}" for field in _shown(event))
                lines.append(f"  {name} at {at:.6f} s: {event.kind}, {shown}")
        if self.fields:
            lines.append(f"  they differ in {', '.join(self.fields)}")
        return "\n".join(lines)


class Diverged(Exception):
    """Ends a replay at its first difference."""

    def __init__(self, difference: Difference) -> None:
        super().__init__(str(difference))
        self.difference = difference


def _shown(event: Event) -> list[str]:
    """What of an event helps to see why it came out differently."""
    wanted = (
        "request", "plan", "digest", "why", "repeat", "num_running", "num_waiting", "free_blocks",
        "admitted", "evicted", "replica", "reason",
    )  # fmt: skip
    return [name for name in wanted if hasattr(event, name)]


class Judge:
    """Implements core.ports.Log for the replayed mechanism: compares what it writes with what the log holds."""

    def __init__(self, who: str) -> None:
        self.who = who
        self.expected: deque[Event] = deque()
        self.num_decisions = 0
        self.num_events = 0
        self.is_over = False

    def emit(self, event: Event) -> None:
        if not self.expected:
            if self.is_over:
                return
            raise Diverged(self.difference(None, event))
        recorded = self.expected.popleft()
        if event != recorded:
            raise Diverged(self.difference(recorded, event))
        self.num_events += 1
        self.num_decisions += isinstance(event, DECISIONS)

    def difference(
        self, recorded: Event | None, replayed: Event | None, failure: str = ""
    ) -> Difference:
        fields: tuple[str, ...] = ()
        if recorded is not None and type(recorded) is type(replayed):
            names = recorded.__struct_fields__
            fields = tuple(
                name for name in names if getattr(recorded, name) != getattr(replayed, name)
            )
        return Difference(
            who=self.who,
            number=self.num_decisions + 1,
            recorded=recorded,
            replayed=replayed,
            fields=fields,
            failure=failure,
        )
