"""What a run's log says of its fleets as wholes: requests that moved between replicas, and replicas that came and went.

Movements are told by mode and how they ended, with what they copied and how long requests stood still; refusals by
the rules that forbade them; decisions of scale policies by their reasons. Of requests under way the words about each
are kept, for `report.explain`, at most WORDS of one and KEPT of all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from penstock.core.moving import Migrated
from penstock.core.steered import Scaled, Steered
from penstock.report.histogram import Histogram
from penstock.report.table import seconds

WORDS = 20
KEPT = 10_000  # requests of which words are kept at once
REASONS = 50  # that are told apart; more are counted together
OTHER = "for other reasons"


@dataclass(slots=True)
class Moved:
    """Movements of one mode that ended in one way."""

    num: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    stages: int = 0
    pauses_s: Histogram = field(default_factory=Histogram)  # of those that went over


class Movements:
    """Fed by whoever reads a log."""

    def __init__(self) -> None:
        self.moved: defaultdict[tuple[str, str], Moved] = defaultdict(Moved)  # by mode, outcome
        self.reasons: Counter[tuple[str, str]] = Counter()  # what became of it, why
        self.denied: Counter[str] = Counter()  # by rule
        self.scaled: Counter[tuple[str, str]] = Counter()  # what else was decided, why; loans too
        self._wanted: dict[str, str] = {}  # why, of movements that are under way
        self._words: dict[str, list[str]] = {}

    def on_migrated(self, event: Migrated) -> None:
        found = self.moved[event.mode, event.outcome]
        found.num += 1
        found.num_blocks += event.num_blocks
        found.num_bytes += event.num_bytes
        found.stages += event.stages
        if event.pause_s is not None and event.outcome == "committed":
            found.pauses_s.add(event.pause_s)
        wanted = self._wanted.pop(event.request, "")
        if event.why and event.outcome != "committed":
            _count(self.reasons, event.outcome, event.why)
        elif wanted:
            _count(self.reasons, event.outcome, wanted)
        words = self._words.get(event.request)
        if words is None and len(self._words) < KEPT:
            words = self._words[event.request] = []
        if words is not None and len(words) < WORDS:
            words.append(_told(event, wanted))

    def on_steered(self, event: Steered) -> None:
        for request, _, _, _ in event.moves:
            self._wanted[request] = event.why or event.cause
        for _, _, _, _, rule in event.denied:
            self.denied[rule] += 1
        if isinstance(event.loans, tuple):
            for _ in event.loans:
                _count(self.scaled, "blocks lent", event.why or event.cause)
        for _ in event.recalls if isinstance(event.recalls, tuple) else ():
            _count(self.scaled, "blocks called back", event.why or event.cause)

    def on_scaled(self, event: Scaled) -> None:
        for what in _decided(event):
            _count(self.scaled, what, event.why)

    def words(self, request: str) -> tuple[str, ...]:
        """How a request moved, in order."""
        return tuple(self._words.get(request, ()))

    def forget(self, request: str) -> None:
        self._words.pop(request, None)

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "moved": [
                {
                    "mode": mode, "outcome": outcome, "num": each.num, "num_blocks": each.num_blocks,
                    "num_bytes": each.num_bytes, "pause_p50_s": each.pauses_s.percentile(50),
                    "pause_p99_s": each.pauses_s.percentile(99),
                }
                for (mode, outcome), each in self.moved.items()
            ],
            "reasons": [[what, why, num] for (what, why), num in self.reasons.most_common()],
            "denied": dict(self.denied),
            "scaled": [[what, why, num] for (what, why), num in self.scaled.most_common()],
        }  # fmt: skip


def _count(counter: Counter[tuple[str, str]], what: str, why: str) -> None:
    is_known = (what, why) in counter or len(counter) < REASONS
    counter[what, why if is_known else OTHER] += 1


def _decided(event: Scaled) -> list[str]:
    told = [f"add {count} ({role})" for role, count in event.add]
    told += [f"put out {name}" for name in event.drain]
    told += [f"{name} takes the role {role}" for name, role in event.roles]
    if isinstance(event.devices, tuple):
        told += [f"{name} gets {count} devices" for name, count in event.devices]
    return told


def _told(event: Migrated, wanted: str) -> str:
    way = f"from {event.source} to {event.target} ({event.mode}"
    if event.outcome != "committed":
        why = f": {event.why}" if event.why else ""
        return f"not {way}): {event.outcome.replace('_', ' ')}{why}"
    if event.num_blocks:
        way += f", {event.num_blocks:,} blocks in {event.stages} stage{'s' * (event.stages != 1)}"
    still = "" if event.pause_s is None else f", standing still for {seconds(event.pause_s)}"
    return f"{way}){still}" + (f": {wanted}" if wanted else "")
