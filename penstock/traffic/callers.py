"""What a caller asks for: one call, a conversation or a program, made at the instant it arrives.

Draws are taken from one seeded stream for each purpose, so that adding a prefix to a workload changes no length in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from penstock.core.config import Table
from penstock.core.rng import stream
from penstock.core.types import Slo
from penstock.traffic.failures import Failures, Faults
from penstock.traffic.images import Images, Shown
from penstock.traffic.lengths import lengths_of
from penstock.traffic.prefix import Prefix, Prefixes
from penstock.traffic.programs import Graphs, Programs
from penstock.traffic.rows import Drop, Flow, FlowKind, Found, Row, size_row
from penstock.traffic.sessions import Conversations, Sessions
from penstock.traffic.tenants import ServiceClass, picker_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What callers of one kind have in common.

    replay: "feedback" asks for a later call when its predecessors have ended; "open" at an instant told in advance, as
    if every answer token took `workflow.NOMINAL_S_PER_TOKEN`.
    """

    lengths: Table | None = None
    prefix: Prefix | None = None
    sessions: Sessions | None = None
    programs: Programs | None = None
    images: Images | None = None
    failures: Failures | None = None
    slo: Slo | None = None
    priority: int | None = None
    service_class: tuple[ServiceClass, ...] = ()
    replay: Literal["feedback", "open"] = "feedback"

    def __post_init__(self) -> None:
        if self.sessions is not None and self.programs is not None:
            raise ValueError("callers have sessions or programs; put two kinds into [[mix]]")
        if self.images is not None and (self.sessions is not None or self.programs is not None):
            raise ValueError("images are of single calls: leave out sessions and programs")
        if self.service_class and (self.slo is not None or self.priority is not None):
            raise ValueError("slo and priority are stated once, or in [[service_class]]")


class Callers:
    """Callers of one kind. `owner` names them: it keeps their chance and their texts apart from others'."""

    def __init__(self, kind: Kind, *, seed: int, owner: str, where: str) -> None:
        self._kind = kind
        self._lengths = _draws(kind.lengths, seed, owner, where)
        self._prefixes = Prefixes(kind.prefix, seed=seed, owner=owner, where=f"{where}prefix")
        self._chance = stream(seed, "traffic", "callers", owner)
        self._classes = None
        if kind.service_class:
            shares = [each.share for each in kind.service_class]
            self._classes = picker_of(kind.service_class, shares)
            self._classing = stream(seed, "traffic", "classes", owner)
        self._flows: tuple[FlowKind, Conversations | Graphs] | None = None
        if kind.sessions is not None:
            self._flows = "session", Conversations(kind.sessions, f"{where}sessions")
        elif kind.programs is not None:
            self._flows = "program", Graphs(kind.programs, f"{where}programs")
        self._faults = None
        if kind.failures is not None:
            failures = kind.failures
            self._faults = Faults(failures, seed=seed, owner=owner, where=f"{where}failures")
        self._shown = None
        if kind.images is not None:
            self._shown = Shown(kind.images, seed=seed, owner=owner, where=f"{where}images")
        self._owner, self._count = owner, 0

    @property
    def is_open(self) -> bool:
        return self._kind.replay == "open"

    def arrive(self, at_s: float, tenant: str) -> Found:
        """What the next caller asks for."""
        assert self._lengths is not None, f"{self._owner} has no lengths"
        num_prompt, num_output = next(self._lengths)
        opening = self._prefixes.draw(num_prompt, tenant)
        if self._prefixes.is_added:
            num_prompt += opening.num_tokens
        row = Row(at_s, num_prompt, num_output, tenant, opening.ids, traced_size=opening.size)
        if self._shown is not None:
            images = self._shown.draw()
            row = row._replace(num_prompt=num_prompt + sum(images), images=images)
        found: Row | Flow = row
        if self._flows is not None:
            self._count += 1
            kind, flows = self._flows
            first = row._replace(at_s=None, session=f"{self._owner}-{kind}-{self._count}")
            first = self._promised(first)
            steps = flows.steps(first, opening, self._lengths, self._chance)
            found = Flow(at_s, kind, steps)
        else:
            found = self._promised(row)
        return found if self._faults is None else self._faults.befall(found)

    def overlay(self, row: Row) -> Found:
        """A traced row with this kind's promises and failures."""
        kept = size_row(self._promised(row))
        if isinstance(kept, Drop) or self._faults is None:
            return kept
        return self._faults.befall(kept)

    def _promised(self, row: Row) -> Row:
        if self._classes is not None:
            found = self._classes.pick(self._classing)
            return row._replace(slo=found.slo, priority=found.priority)
        if self._kind.slo is not None or self._kind.priority is not None:
            return row._replace(slo=self._kind.slo, priority=self._kind.priority)
        return row


def _draws(
    table: Table | None, seed: int, owner: str, where: str
) -> Iterator[tuple[int, int]] | None:
    if table is None:
        return None
    own = stream(seed, "traffic", "lengths", owner).getrandbits(63)
    return iter(lengths_of(table, f"{where}lengths").draws(own))
