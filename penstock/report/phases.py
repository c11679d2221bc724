"""The phases of each answer as they follow one another in a log, for tools that draw them.

They are queue, prefill, decode and, after a preemption, preempted and recompute; of one that comes from another replica
moving first. Phases of an answer touch: each begins where the one before ends. A part of an answer that goes on at
another replica ends as moved, and a copy that was made for a movement that came to nothing as dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from msgspec import UNSET

from penstock.core.events import Arrived, Completed, Event, Finished, Opened, Routed, Stepped
from penstock.core.moving import Departed, Migrated, Settled, SettleHow


@dataclass(slots=True)
class Walk:
    """One answer: the names of its phases and the instants at which they began. `end_at` once it ended."""

    who: str
    seq: int
    event: Arrived
    phases: list[tuple[str, float]] = field(default_factory=list)
    end_at: float | None = None
    finished: Finished | None = None
    left: Literal["moved", "dropped"] | None = None  # it ended without a Finished
    moved_to: str | None = None  # replicas, as far as the fleet's log is at hand
    moved_from: str | None = None

    @property
    def phase(self) -> str:
        return self.phases[-1][0]

    def spans(self) -> list[tuple[str, float, float]]:
        """Name, begin and end of each phase, of an answer that ended."""
        assert self.end_at is not None
        ends = [at for _, at in self.phases[1:]] + [self.end_at]
        return [(name, at, max(at, end)) for (name, at), end in zip(self.phases, ends, strict=True)]


class Phases:
    """Implements core.ports.Log. `on_phase` hears of each phase that begins, `on_end` of each answer that ends."""

    def __init__(self, on_phase: Callable[[Walk], None], on_end: Callable[[Walk], None]) -> None:
        self._on_phase, self._on_end = on_phase, on_end
        self._walks: dict[tuple[str, int], Walk] = {}
        self._seqs: dict[tuple[str, str], tuple[int, int]] = {}  # first seq and number of answers
        self._fleets: set[str] = set()
        self._settled: dict[tuple[str, str], SettleHow] = {}  # of jobs that are about to depart
        self._targets: dict[tuple[str, str], str] = {}

    def emit(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self._on_stepped(event)
        elif isinstance(event, Completed):
            self._on_completed(event)
        elif isinstance(event, Arrived):
            self._on_arrived(event)
        elif isinstance(event, Finished):
            self._on_finished(event)
        elif isinstance(event, Departed):
            self._on_departed(event)
        elif isinstance(event, Settled):
            if (event.who, event.request) in self._seqs:
                self._settled[event.who, event.request] = event.how
        elif isinstance(event, Migrated):
            self._on_migrated(event)
        elif isinstance(event, Opened) and event.what == "fleet":
            self._fleets.add(event.who)
        elif isinstance(event, Routed) and event.who not in self._fleets:
            self._fleets.add(event.who)
            self._walks = {key: walk for key, walk in self._walks.items() if key[0] != event.who}

    def close(self, at: float) -> None:
        """The log is over: whoever is still under way ends here."""
        for walk in self._walks.values():
            walk.end_at = max(at, walk.phases[-1][1])
            self._on_end(walk)
        self._walks.clear()

    def _begin(self, walk: Walk, phase: str, at: float) -> None:
        if walk.phases:
            at = max(at, walk.phases[-1][1])
        walk.phases.append((phase, at))
        self._on_phase(walk)

    def _on_arrived(self, event: Arrived) -> None:
        if event.who in self._fleets:
            return
        self._seqs[event.who, event.request] = (event.seq, event.n)
        for answer in range(event.n):
            seq = event.seq + answer
            walk = self._walks[event.who, seq] = Walk(event.who, seq, event)
            self._begin(walk, "queue" if event.move is UNSET else "moving", event.at)

    def _on_stepped(self, event: Stepped) -> None:
        for seq in event.evicted:
            walk = self._walks.get((event.who, seq))
            if walk is not None and walk.phase not in ("queue", "preempted"):
                self._begin(walk, "preempted", event.at)
        for seq in event.admitted:
            walk = self._walks.get((event.who, seq))
            if walk is not None and walk.phase in ("queue", "moving", "preempted"):
                self._begin(walk, "prefill" if walk.phase == "queue" else "recompute", event.at)

    def _on_completed(self, event: Completed) -> None:
        for seq, tokens, _, _ in event.outputs:
            walk = self._walks.get((event.who, seq)) if tokens else None
            if walk is not None and walk.phase in ("prefill", "recompute", "moving"):
                self._begin(walk, "decode", event.ends[0])

    def _on_finished(self, event: Finished) -> None:
        first, num = self._seqs.get((event.who, event.request), (0, 0))
        walk = self._walks.pop((event.who, first + event.answer), None) if num else None
        if walk is None:
            return
        if not any((event.who, seq) in self._walks for seq in range(first, first + num)):
            del self._seqs[event.who, event.request]
            self._settled.pop((event.who, event.request), None)
        end_at = event.at if event.last_token_at is None else event.last_token_at
        walk.end_at, walk.finished = max(end_at, walk.phases[-1][1]), event
        self._on_end(walk)

    def _on_migrated(self, event: Migrated) -> None:
        if event.outcome != "committed":
            return
        if (event.source, event.request) in self._seqs:
            self._targets[event.source, event.request] = event.target
        first, _ = self._seqs.get((event.target, event.request), (None, 0))
        walk = None if first is None else self._walks.get((event.target, first))
        if walk is not None:
            walk.moved_from = event.source

    def _on_departed(self, event: Departed) -> None:
        """It goes on at another replica, where it is another walk."""
        self._seqs.pop((event.who, event.request), None)
        walk = self._walks.pop((event.who, event.seq), None)
        target = self._targets.pop((event.who, event.request), None)
        how = self._settled.pop((event.who, event.request), None)
        if walk is not None:
            is_moved = target is not None or how == "release"
            walk.left, walk.moved_to = "moved" if is_moved else "dropped", target
            walk.end_at = max(event.at, walk.phases[-1][1])
            self._on_end(walk)
