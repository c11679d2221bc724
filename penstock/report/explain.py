"""Follows every answer through a log and says, when it ends, where its time went; causes are those of `report.causes`.

One pass, and memory for the answers under way only. What a decode step would have cost without the prompts in it is
read from the log itself: the mean of the steps of as many decodes and nothing else on the same replica so far, straight
lines between batch sizes that did not occur. Where a replica never ran such a step, those of the other replicas stand
in; where nobody did, the step counts as decode.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from msgspec import UNSET

from penstock.core.events import (
    Arrived,
    Completed,
    Ended,
    Event,
    Finished,
    Opened,
    Refused,
    Routed,
    Stepped,
)
from penstock.core.moving import Departed, Landed, Parted, Took
from penstock.report.causes import Explanation
from penstock.report.encodings import HandedOn, encoded
from penstock.report.lives import (
    Flight,
    Life,
    Pace,
    Watched,
    came_before,
    decoded,
    limits_of,
    ordered,
    prefilled,
    stand_by,
)
from penstock.report.movements import Movements

NAMED = 3  # how many of those ahead of a request are told by name


class _Turned(NamedTuple):
    """A request that a fleet has just ended."""

    request: str
    offered_at: float
    tries: list[tuple[str, str]]


class Explainer:
    """Implements core.ports.Log. `on_explained` hears of each answer that ended; `focus` are followed more closely."""

    def __init__(
        self, on_explained: Callable[[Explanation], None], *, focus: Collection[str] = ()
    ) -> None:
        self._on_explained = on_explained
        self._focus = frozenset(focus)
        self._replicas: defaultdict[str, Watched] = defaultdict(Watched)
        self._fleets: set[str] = set()
        self._offers: dict[str, float] = {}
        self._routes: dict[str, list[tuple[str, str]]] = {}  # replica and why, of each try
        self._ended: dict[str, _Turned] = {}  # the last of each fleet, which may be routed again
        self._pace = Pace()  # of all replicas
        self._now, self.movements = 0.0, Movements()
        self._listeners: dict[str, Callable[[Any], None]] = {
            "opened": self._on_opened,
            "arrived": self._on_arrived,
            "routed": self._on_routed,
            "refused": self._on_refused,
            "stepped": self._on_stepped,
            "completed": self._on_completed,
            "finished": self._on_finished,
            "ended": self._on_ended,
            "took": self._on_took,
            "landed": self._on_landed,
            "departed": self._on_departed,
            "parted": self._on_parted,
            "migrated": self.movements.on_migrated,
            "steered": self.movements.on_steered,
            "scaled": self.movements.on_scaled,
        }
        self._took: dict[tuple[str, str], Took] = {}  # the last of each job that comes
        self._handed_on = HandedOn()

    def emit(self, event: Event) -> None:
        listener = self._listeners.get(event.kind)
        if listener is not None:
            listener(event)

    def unfinished(self) -> list[Explanation]:
        """Answers that the log does not see the end of, explained up to the last event of their replica."""
        told = []
        for who, watched in self._replicas.items():
            watched.pass_time(max(watched.bound_at, self._now))
            for life in watched.lives.values():
                self._close(watched, life, self._now)
                told.append(self._explanation(who, life, "unfinished", self._now))
        return told

    # ------------------------------------------------------------------ fleets

    def _on_opened(self, event: Opened) -> None:
        if event.what == "fleet":
            self._fleets.add(event.who)
        else:
            self._replicas[event.who].limits = limits_of(event)

    def _on_routed(self, event: Routed) -> None:
        if event.who not in self._fleets:  # its Opened is not in this log
            self._fleets.add(event.who)
            for life in self._replicas.pop(event.who, Watched()).lives.values():
                self._offers[life.event.request] = life.event.at
        turned = self._ended.pop(event.who, None)
        if turned is not None and turned.request == event.request:
            self._offers[event.request] = turned.offered_at
            self._routes[event.request] = turned.tries
        if event.replica is not None:
            tries = self._routes.setdefault(event.request, [])
            tries.append((event.replica, event.why))

    def _on_ended(self, event: Ended) -> None:
        """Whoever its replica turned away is routed again at once, in the fleet's next event."""
        offered_at = self._offers.pop(event.request, event.at)
        tries = self._routes.pop(event.request, [])
        self._ended[event.who] = _Turned(event.request, offered_at, tries)

    def _on_refused(self, event: Refused) -> None:
        """The fleet gave up: nothing more comes."""
        if event.who in self._fleets:
            self._offers.pop(event.request, None)
            self._routes.pop(event.request, None)

    # ------------------------------------------------------------------ replicas

    def _on_arrived(self, event: Arrived) -> None:
        self._now = max(self._now, event.at)
        if event.who in self._fleets:
            self._ended.pop(event.who, None)
            self._offers[event.request] = event.at
            return
        watched = self._replicas[event.who]
        offered_at = min(self._offers.get(event.request, event.at), event.at)
        ahead = tuple(
            each.event.request
            for each, _ in zip(watched.waiting.values(), range(NAMED), strict=False)
        )
        num_ahead = len(watched.waiting)
        watched.by_request[event.request] = event.seq
        for answer in range(event.n):
            life = Life(event, event.seq + answer, offered_at, offered_at)
            life.book("routing" if event.num_output is UNSET else "elsewhere", event.at)
            if isinstance(event.ages, tuple):
                came_before(life, event.at, *event.ages)
            life.ahead, life.ahead_of = num_ahead, ahead
            if event.request in self._focus:
                life.overtaken_by = []
            watched.lives[life.seq] = life
            if event.move is UNSET:
                watched.waiting[life.seq] = life
                watched.fresh.append(life)

    def _on_took(self, event: Took) -> None:
        self._took[event.who, event.request] = event
        life = self._life_of(event)
        if life is not None:
            life.computed, life.num_output = event.computed, event.num_output
            came_before(life, event.at, event.age_s, event.first_token_age_s)

    def _on_landed(self, event: Landed) -> None:
        """Its blocks are here, and it runs; or it brought none, and waits."""
        took, life = self._took.pop((event.who, event.request), None), self._life_of(event)
        if took is None or life is None or event.error is not None or not took.is_last:
            return
        watched = self._replicas[event.who]
        life.book("elsewhere", event.at)
        if life.event.images:
            self._handed_on.landed(life)
        if not took.computed:
            watched.waiting[life.seq] = life
            watched.fresh.append(life)
            return
        life.is_running, life.is_fresh = True, False
        life.stepped_seen, life.prefill_seen = watched.stepped_s, watched.prefill_s
        if not life.has_output:
            watched.prefilling.add(life.seq)

    def _on_departed(self, event: Departed) -> None:
        life = self._life_of(event)
        if life is not None:
            self._forget(self._replicas[event.who], life)

    def _on_parted(self, event: Parted) -> None:
        life = self._life_of(event)
        if life is not None and life.event.images:
            self._handed_on.parted(life, event.at)

    def _life_of(self, event: Took | Landed | Departed | Parted) -> Life | None:
        """Only requests of one answer move."""
        watched = self._replicas[event.who]
        seq = watched.by_request.get(event.request)
        return None if seq is None else watched.lives.get(seq)

    def _on_stepped(self, event: Stepped) -> None:
        watched, now = self._replicas[event.who], event.at
        self._now = max(self._now, now)
        watched.pass_time(now)
        for life in watched.fresh:
            life.book("step-boundary", now)
            life.waited_at, life.is_fresh = watched.waited, False
        watched.fresh.clear()
        for seq in event.evicted:
            self._evict(watched, seq, event)
        for seq in event.admitted:
            self._start(watched, seq, event)
        watched.bound = watched.bound_of(event)
        if event.plan is not None:
            prefilling = watched.prefilling
            prefill = (
                {seq: tokens for seq, tokens in event.chunks if seq in prefilling}
                if prefilling
                else {}
            )
            seqs = [seq for seq, _ in event.chunks]
            watched.flights[event.plan] = Flight(
                now, event.lane, seqs, prefill, sum(prefill.values())
            )
            if event.images:
                watched.flights[event.plan].images = tuple([seq for seq, _ in event.images])

    @staticmethod
    def _evict(watched: Watched, seq: int, event: Stepped) -> None:
        life = watched.lives.get(seq)
        if life is None or not life.is_running:
            return
        stand_by(watched, life, event.at)
        told = f"{event.at - life.offered_at:.3f} s after it was asked for, {event.num_running} answers stayed"
        life.evictions.append(f"{told} ({event.why})" if event.why else told)
        life.is_running = False
        life.num_preemptions += 1
        life.lost = life.computed + life.num_output
        life.computed = 0
        watched.prefilling.discard(seq)
        watched.waiting[seq] = life

    @staticmethod
    def _start(watched: Watched, seq: int, event: Stepped) -> None:
        life = watched.lives.get(seq)
        if life is None or life.is_running:
            return
        if life.num_preemptions:
            life.book("preempted", event.at)
        else:
            life.book_queue(event.at, watched.waited)
            life.why_started = event.why
        life.is_running = True
        life.stepped_seen, life.prefill_seen = watched.stepped_s, watched.prefill_s
        watched.waiting.pop(seq, None)
        watched.prefilling.add(seq)
        for other in watched.waiting.values():
            if other.overtaken_by is not None:
                other.overtaken_by.append(life.event.request)

    def _on_completed(self, event: Completed) -> None:
        watched = self._replicas[event.who]
        self._now = max(self._now, event.at)
        flight = watched.flights.pop(event.plan, None)
        if flight is None:
            return
        flight.settle(watched.prefilling)
        end, steps = event.ends[-1], event.steps_run
        start = max(flight.at, watched.last_end.get(flight.lane, flight.at))
        watched.last_end[flight.lane] = end
        is_mixed = bool(flight.prefill or flight.images) and steps == 1
        if flight.images:
            watched.pass_time(max(watched.bound_at, event.at))
            encoded(watched, flight, start, end)
        got = {seq: tokens for seq, tokens, _, _ in event.outputs}
        for seq in flight.seqs:
            life = watched.lives.get(seq)
            if life is None:
                continue
            stand_by(watched, life, start)
            if seq in flight.prefill:
                prefilled(watched, life, flight, event.ends, got.get(seq, 0))
            else:
                decoded(life, flight, end, steps, is_mixed)
                life.num_output += got.get(seq, 0)
        watched.stepped_s += end - start
        if flight.prefill or flight.images:
            watched.prefill_s += end - start
        else:
            watched.pace.add(len(flight.seqs), steps, end - start)
            self._pace.add(len(flight.seqs), steps, end - start)
        for seq in flight.seqs:
            life = watched.lives.get(seq)
            if life is not None:
                life.stepped_seen, life.prefill_seen = watched.stepped_s, watched.prefill_s

    def _on_finished(self, event: Finished) -> None:
        watched = self._replicas[event.who]
        self._now = max(self._now, event.at)
        life = self._find(watched, event)
        if life is None:
            return
        end_at = event.at if event.last_token_at is None else event.last_token_at
        watched.pass_time(max(watched.bound_at, event.at))
        self._close(watched, life, end_at)
        self._forget(watched, life)
        life.num_cached, life.num_output = event.num_cached, event.num_output
        self._on_explained(self._explanation(event.who, life, event.reason, end_at))
        self.movements.forget(event.request)
        self._handed_on.forget(event.request)

    @staticmethod
    def _forget(watched: Watched, life: Life) -> None:
        del watched.lives[life.seq]
        watched.waiting.pop(life.seq, None)
        watched.prefilling.discard(life.seq)
        if life.is_fresh:
            watched.fresh = [other for other in watched.fresh if other is not life]
        first = life.event.seq
        if not any(seq in watched.lives for seq in range(first, first + life.event.n)):
            del watched.by_request[life.event.request]

    @staticmethod
    def _find(watched: Watched, event: Finished) -> Life | None:
        """By its request and answer: the event does not say its seq."""
        known = watched.by_request.get(event.request)
        return None if known is None else watched.lives.get(known + event.answer)

    def _close(self, watched: Watched, life: Life, end_at: float) -> None:
        """Give a cause to what is left of its life, and settle its decode steps."""
        if life.is_running:
            stand_by(watched, life, end_at)
        elif life.num_preemptions:
            life.book("preempted", end_at)
        elif life.is_fresh:
            life.book("step-boundary", end_at)
        else:
            life.book_queue(end_at, watched.waited)
        pace = watched.pace if watched.pace.alone() is not None else self._pace
        decode_s, steps = life.decode_s, life.num_steps
        for size, step_s in life.mixed:
            pure_s = pace.at(size)
            pure_s = step_s if pure_s is None else min(step_s, pure_s)
            decode_s += pure_s
            life.parts["interference"] += step_s - pure_s
        alone_s = pace.alone()
        own_s = decode_s if alone_s is None else min(decode_s, steps * alone_s)
        life.parts["decode"] += own_s
        life.parts["batch"] += decode_s - own_s

    def _explanation(self, who: str, life: Life, reason: str, end_at: float) -> Explanation:
        event = life.event
        routes = self._routes.get(event.request, [])
        return Explanation(
            request=event.request,
            answer=life.seq - event.seq,
            who=who,
            tenant=event.tenant,
            priority=event.priority,
            slo=event.slo,
            reason=reason,
            offered_at=life.offered_at,
            end_at=max(end_at, life.offered_at),
            parts=ordered(life.parts),
            first_parts=life.first_parts,
            num_prompt=event.num_prompt,
            num_cached=life.num_cached,
            num_output=life.num_output,
            num_preemptions=life.num_preemptions,
            num_steps=life.num_steps,
            ahead=life.ahead,
            ahead_of=life.ahead_of,
            overtaken_by=tuple(life.overtaken_by or ()),
            max_batch=life.max_batch,
            why_routed=routes[-1][1] if routes else "",
            why_started=life.why_started,
            evictions=tuple(life.evictions),
            moves=self.movements.words(event.request),
            tries=tuple(f"{replica}: {why}" if why else replica for replica, why in routes),
        )
