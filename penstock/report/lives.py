"""What is followed of each answer and each replica while a log passes by, for `report.explain`.

A Life keeps a `mark`: the instant up to which its seconds have a cause. Every event moves the mark and books the
difference, so that the parts telescope to the whole whatever the log says.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field

from penstock.core.errors import BadTrace
from penstock.core.events import Arrived, Opened, Stepped
from penstock.policy import find
from penstock.report.causes import CAUSES
from penstock.report.made import MadeReplica, made_of

BOUNDS = ("max-jobs", "tokens", "blocks", "policy")
NO_TIMES = (0.0, 0.0, 0.0, 0.0)
Parts = defaultdict[str, float]


@dataclass(slots=True)
class Life:
    """One answer of a request inside its replica. `waited_at`: the replica's waiting times when its own began."""

    event: Arrived
    seq: int
    mark: float
    offered_at: float
    parts: Parts = field(default_factory=lambda: defaultdict(float))
    first_parts: dict[str, float] | None = None
    is_running: bool = False
    is_fresh: bool = True
    has_output: bool = False
    waited_at: tuple[float, ...] = NO_TIMES
    stepped_seen: float = 0.0
    prefill_seen: float = 0.0
    computed: int = 0
    lost: int = 0
    num_preemptions: int = 0
    num_cached: int = 0
    num_output: int = 0
    decode_s: float = 0.0
    num_steps: int = 0
    max_batch: int = 0
    mixed: list[tuple[int, float]] = field(default_factory=list)  # decodes in the step, its seconds
    ahead: int = 0
    ahead_of: tuple[str, ...] = ()
    overtaken_by: list[str] | None = None
    why_started: str = ""
    evictions: list[str] = field(default_factory=list)

    def book(self, cause: str, until: float) -> None:
        """All up to `until` under one cause."""
        if until > self.mark:
            self.parts[cause] += until - self.mark
            self.mark = until

    def book_queue(self, until: float, waited: tuple[float, ...]) -> None:
        """All up to `until` as queueing, split by what bound the decisions since the wait began."""
        if until <= self.mark:
            return
        shares = [now - before for now, before in zip(waited, self.waited_at, strict=True)]
        whole, span = sum(shares), until - self.mark
        if whole <= 0:
            self.book("queue-policy", until)
            return
        for bound, share in zip(BOUNDS, shares, strict=True):
            if share > 0:
                self.parts[f"queue-{bound}"] += span * share / whole
        self.mark = until


@dataclass(slots=True)
class Flight:
    """A launched plan: who is in it, and the prompt tokens of those who are still computing their prompt."""

    at: float
    lane: int
    seqs: list[int]
    prefill: dict[int, int]
    prefill_tokens: int
    images: tuple[int, ...] = ()  # those with images that it encodes

    def settle(self, prefilling: set[int]) -> None:
        """Whoever got its first token while this plan, made ahead, waited for its turn decodes in it."""
        if self.prefill and not self.prefill.keys() <= prefilling:
            self.prefill = {seq: num for seq, num in self.prefill.items() if seq in prefilling}
            self.prefill_tokens = sum(self.prefill.values())

    @property
    def num_decodes(self) -> int:
        return len(self.seqs) - len(self.prefill)


class Pace:
    """How long steps of nothing but decodes take, by their number: means, straight lines between them."""

    def __init__(self) -> None:
        self._sums: dict[int, list[float]] = {}
        self._sizes: list[int] = []

    def add(self, size: int, steps: int, seconds: float) -> None:
        found = self._sums.get(size)
        if found is None:
            self._sums[size] = [steps, seconds]
            self._sizes = sorted(self._sums)
        else:
            found[0] += steps
            found[1] += seconds

    def _mean(self, size: int) -> float:
        steps, seconds = self._sums[size]
        return seconds / steps

    def at(self, size: int) -> float | None:
        """Seconds of a step of `size` decodes; None when there was never one to compare with."""
        sizes = self._sizes
        if not sizes:
            return None
        place = bisect_left(sizes, size)
        if place == len(sizes):
            return self._mean(sizes[-1])
        if place == 0 or sizes[place] == size:
            return self._mean(sizes[place])
        low, high = sizes[place - 1], sizes[place]
        share = (size - low) / (high - low)
        return self._mean(low) * (1 - share) + self._mean(high) * share

    def alone(self) -> float | None:
        """Seconds of a step of the smallest batch there was."""
        return self._mean(self._sizes[0]) if self._sizes else None


@dataclass(slots=True)
class Limits:
    """What bounds the steps of a replica, as its Opened event says. None = not known."""

    max_jobs: int | None = None
    max_tokens: int | None = None
    block_size: int | None = None


@dataclass(slots=True)
class Watched:
    """One replica. `waited[i]`: seconds during which BOUNDS[i] kept its queue waiting."""

    limits: Limits = field(default_factory=Limits)
    lives: dict[int, Life] = field(default_factory=dict)
    by_request: dict[str, int] = field(default_factory=dict)  # the first seq of each
    waiting: dict[int, Life] = field(default_factory=dict)
    fresh: list[Life] = field(default_factory=list)
    prefilling: set[int] = field(default_factory=set)
    flights: dict[int, Flight] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)
    waited: tuple[float, ...] = NO_TIMES
    bound: int = len(BOUNDS) - 1
    bound_at: float = 0.0
    stepped_s: float = 0.0  # of all steps
    prefill_s: float = 0.0  # of steps with prompts in them
    last_end: dict[int, float] = field(default_factory=dict)  # of each lane

    def pass_time(self, now: float) -> None:
        """The queue has waited until `now` for what bound the last decision."""
        if now > self.bound_at:
            waited = list(self.waited)
            waited[self.bound] += now - self.bound_at
            self.waited = tuple(waited)
        self.bound_at = now

    def bound_of(self, event: Stepped) -> int:
        """The place in BOUNDS of what keeps the queue waiting after this decision."""
        limits = self.limits
        if limits.max_jobs is not None and event.num_running >= limits.max_jobs:
            return 0
        if limits.max_tokens is not None and self._tokens(event) >= limits.max_tokens:
            return 1
        if event.evicted or "memory" in event.why:
            return 2
        head = next(iter(self.waiting.values()), None)
        if head is not None and limits.block_size is not None:
            blocks = -(-head.event.num_prompt // limits.block_size)
            if blocks > event.free_blocks:
                return 2
        return 3

    @staticmethod
    def _tokens(event: Stepped) -> int:
        return sum([tokens for _, tokens in event.chunks])


def limits_of(event: Opened) -> Limits:
    """What bounds a replica's steps, from the record of how it was made."""
    try:
        made = made_of(event)
    except BadTrace:
        return Limits()
    if not isinstance(made, MadeReplica):
        return Limits()
    policies = made.spec.get("policies")
    table = dict(policies.get("batch", {})) if isinstance(policies, dict) else {}
    fields = _defaults(str(table.get("name", ""))) | table
    tokens = fields.get("max_tokens", fields.get("chunk_tokens"))
    jobs = fields.get("max_jobs")
    block_size = made.spec.get("block_size")
    return Limits(
        max_jobs=min(jobs, made.caps.max_jobs) if isinstance(jobs, int) else None,
        max_tokens=min(tokens, made.caps.max_batch_tokens) if isinstance(tokens, int) else None,
        block_size=block_size if isinstance(block_size, int) else None,
    )


def _defaults(name: str) -> dict[str, object]:
    """The parameters of a batch policy as they are when nobody states them."""
    try:
        found = find("batch", name)
    except KeyError:  # a policy of another version
        return {}
    if not dataclasses.is_dataclass(found):
        return {}
    return {each.name: each.default for each in dataclasses.fields(found) if each.init}


def came_before(life: Life, at: float, age_s: float, first_token_age_s: float | None) -> None:
    """At instant `at` it had been asked for, and had its first token, so long ago, at another replica."""
    began_at = min(life.offered_at, at - age_s)
    life.parts["elsewhere"] += life.offered_at - began_at
    life.offered_at = began_at
    if first_token_age_s is not None:
        life.has_output = True
        life.first_parts = {"elsewhere": max(0.0, at - first_token_age_s - began_at)}


def stand_by(watched: Watched, life: Life, until: float) -> None:
    """It ran, but no step with it was under way since its mark: others' steps, or none."""
    gap = until - life.mark
    if gap <= 0:
        return
    stepped = min(gap, max(0.0, watched.stepped_s - life.stepped_seen))
    behind = min(stepped, max(0.0, watched.prefill_s - life.prefill_seen))
    cause = "interference" if life.has_output else "shared-prefill"
    life.parts[cause] += behind
    life.parts["passed-over"] += stepped - behind
    life.parts["between-steps"] += gap - stepped
    life.mark = until


def decoded(life: Life, flight: Flight, end: float, steps: int, is_mixed: bool) -> None:
    """A launch that gave it one token a step."""
    spent = end - life.mark
    if spent <= 0:
        return
    life.num_steps += steps
    life.max_batch = max(life.max_batch, len(flight.seqs))
    if is_mixed:
        life.mixed.append((flight.num_decodes, spent))
    else:
        life.decode_s += spent
    life.mark = end


def ordered(parts: dict[str, float]) -> dict[str, float]:
    return {cause: parts[cause] for cause in CAUSES if parts.get(cause, 0.0) > 0}


def prefilled(
    watched: Watched, life: Life, flight: Flight, ends: tuple[float, ...], got: int
) -> None:
    """A step that computed part of what it has to know; the further steps of a repeated launch are decodes."""
    tokens = flight.prefill[life.seq]
    spent = max(0.0, ends[0] - life.mark)
    own = spent * tokens / flight.prefill_tokens if flight.prefill_tokens else spent
    again = tokens if life.has_output else min(tokens, life.lost)
    life.parts["recompute"] += own * again / tokens
    life.parts["prefill"] += own * (tokens - again) / tokens
    life.parts["shared-prefill"] += spent - own
    life.mark = max(life.mark, ends[0])
    life.lost -= min(tokens, life.lost)
    life.computed += tokens
    if not got:
        return
    watched.prefilling.discard(life.seq)
    life.num_output += got
    life.lost = 0
    if not life.has_output:
        life.has_output = True
        life.first_parts = ordered(life.parts)
    if len(ends) > 1:
        decoded(life, flight, ends[-1], len(ends) - 1, is_mixed=False)
