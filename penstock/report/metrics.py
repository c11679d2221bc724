"""Figures from events, as they stream past: a sink for a live run, or fed from a log.

Definitions are those of `report.summary`. One clock a latency: all instants of a request come from the log of the
replica that served it. What is kept is a few floats an answer (exact percentiles) and, for the gaps between tokens,
a histogram (within 0.55%); nothing is kept a token.

Who was offered what: in a log with a fleet, the fleet's arrivals count (a replica's would count twice); in a replica's
own log, its arrivals. A refused request that a fleet sent elsewhere and that finished there is no refusal; so
refusals and their errors are counted where the request was offered. A fleet that is turned away writes Ended, and then
routes the same request again or refuses it; nothing of the fleet's comes in between.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Literal

from penstock.core.events import (
    Arrived,
    Completed,
    Ended,
    Event,
    Finished,
    Refused,
    Routed,
)
from penstock.core.moving import Departed, Took
from penstock.core.types import Slo
from penstock.report.summary import Answer, Figures, Group, class_name, figures_of

GroupName = tuple[str, str]  # tenant, class
UNKNOWN = "unknown", "unknown"  # logs of 0.1 do not say whose requests were turned away at the door
_Open = tuple[str, str, int]  # tenant, class, answers


class _Offers:
    """What reached one fleet or replica, by tenant and class."""

    def __init__(self) -> None:
        self.offered: Counter[tuple[str, str]] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self.errors: Counter[str] = Counter()
        self.open: dict[str, _Open] = {}  # refusable: arrived and not yet ended
        self.just_ended: tuple[str, _Open] | None = None  # and may yet be tried again or refused
        self.strangers: Counter[GroupName] = Counter()  # refused before they arrived

    def end(self, request: str) -> None:
        entry = self.open.pop(request, None)
        self.just_ended = None if entry is None else (request, entry)

    def again(self, request: str) -> None:
        """Whoever has just ended and is heard of again has not ended."""
        if self.just_ended is not None and self.just_ended[0] == request:
            self.open[request] = self.just_ended[1]
        self.just_ended = None

    def refuse(self, request: str, code: str, stranger: GroupName, num: int) -> None:
        """`stranger`: the group of a request that had not arrived."""
        self.again(request)
        self.errors[code] += 1
        entry = self.open.pop(request, None)
        if entry is None:
            self.strangers[stranger] += num
        else:
            tenant, name, num = entry
            self.refused[tenant, name] += num


class _Heard:
    """An answer that tokens may come for: its group, and when its last token came."""

    __slots__ = ("group", "last_at")

    def __init__(self, group: GroupName) -> None:
        self.group = group
        self.last_at: float | None = None


class Metrics:
    """Implements core.ports.Log. `slo`: judge every answer by this promise instead of its own.

    `has_gaps` False leaves out ITL, the only figure that costs time for every token.
    """

    def __init__(self, slo: Slo | None = None, *, has_gaps: bool = True) -> None:
        self._slo = slo
        self._has_gaps = has_gaps
        self._groups: defaultdict[tuple[str, str], Group] = defaultdict(Group)
        self._offers: defaultdict[str, _Offers] = defaultdict(_Offers)
        self._fleets: set[str] = set()
        self._first_at = math.inf
        self._last_at = -math.inf
        self._heard: defaultdict[str, dict[int, _Heard]] = defaultdict(dict)  # by seq
        self._seqs: dict[tuple[str, str], list[int]] = {}  # first seq, answers still open
        self._names: dict[tuple[str, int, Slo], GroupName] = {}
        self.num_steps = 0
        self._listeners = {
            "arrived": self._on_arrived,
            "refused": self._on_refused,
            "completed": self._on_completed,
            "finished": self._on_finished,
            "ended": self._on_ended,
            "routed": self._on_routed,
            "reported": self._on_fleet,
            "took": self._on_took,
            "departed": self._on_departed,
        }

    def emit(self, event: Event) -> None:
        listener = self._listeners.get(event.kind)
        if listener is not None:
            listener(event)  # type: ignore[operator]

    def read(self, events: Iterable[Event]) -> Metrics:
        """Take in all events; self, for chaining."""
        for event in events:
            self.emit(event)
        return self

    def _name_of(self, event: Arrived | Finished) -> GroupName:
        """Requests with equal promises are counted together; naming them once is enough."""
        asked = event.tenant, event.priority, self._slo or event.slo
        name = self._names.get(asked)
        if name is None:
            name = self._names[asked] = event.tenant, class_name(*asked[1:])
        return name

    def _on_fleet(self, event: Event) -> None:
        self._fleets.add(event.who)

    def _on_routed(self, event: Routed) -> None:
        self._fleets.add(event.who)
        self._offers[event.who].again(event.request)

    def _on_arrived(self, event: Arrived) -> None:
        name, who, at = self._name_of(event), event.who, event.at
        if who not in self._fleets:  # a replica may hear only what is left of a promise
            name = self._offered_as(event.request) or name
        offers = self._offers[who]
        offers.just_ended = None
        offers.offered[name] += event.n
        offers.open[event.request] = (*name, event.n)
        if at < self._first_at:
            self._first_at = at
        if at > self._last_at:
            self._last_at = at
        if who not in self._fleets:
            self._seqs[who, event.request] = [event.seq, event.n]
            for answer in range(event.n):
                self._heard[who][event.seq + answer] = _Heard(name)

    def _offered_as(self, request: str) -> GroupName | None:
        """How a fleet counts it."""
        for who in self._fleets:
            entry = self._offers[who].open.get(request)
            if entry is not None:
                return entry[:2]
        return None

    def _on_refused(self, event: Refused) -> None:
        name = UNKNOWN
        if event.tenant is not None:
            name = event.tenant, class_name(event.priority, self._slo or event.slo)
        self._offers[event.who].refuse(event.request, event.code, name, event.n)
        self._seqs.pop((event.who, event.request), None)

    def _on_completed(self, event: Completed) -> None:
        self.num_steps += event.steps_run
        if not self._has_gaps:
            return
        ends, heard = event.ends, self._heard[event.who]
        end = ends[-1]
        # Neighbours mostly got their last token together: they are counted as one run.
        runs: list[tuple[GroupName, float | None, int, int]] = []
        group: GroupName | None = None
        before: float | None = None
        tokens = num = 0
        for seq, got, _, _ in event.outputs:
            answer = heard.get(seq)
            if answer is None or not got:
                continue
            if answer.last_at == before and got == tokens and answer.group is group:
                num += 1
            else:
                if group is not None:
                    runs.append((group, before, tokens, num))
                group, before, tokens, num = answer.group, answer.last_at, got, 1
            answer.last_at = end
        if group is not None:
            runs.append((group, before, tokens, num))
        self._add_gaps(ends, runs)

    def _add_gaps(
        self, ends: tuple[float, ...], runs: list[tuple[GroupName, float | None, int, int]]
    ) -> None:
        """Runs of (group, last token at, tokens got, answers) of a completion that ended at `ends`."""
        start, num_ends = ends[0], len(ends)
        first: dict[tuple[GroupName, float], int] = {}  # gaps up to this completion
        inner: dict[tuple[GroupName, int], int] = {}  # answers by the tokens they got in it
        for group, before, tokens, num in runs:
            if before is not None:
                gap = group, start - before
                first[gap] = first.get(gap, 0) + num
            if tokens > 1:
                more = group, tokens
                inner[more] = inner.get(more, 0) + num
        for (group, gap_s), count in first.items():
            self._groups[group].itl_s.add(gap_s, count)
        for (group, tokens), count in inner.items():
            found = self._groups[group].itl_s
            if num_ends > 1:
                found.add_gaps(ends, count)
            if tokens > num_ends:  # several tokens of one step come at once
                found.add(0.0, (tokens - num_ends) * count)

    def _on_finished(self, event: Finished) -> None:
        known = self._seqs.get((event.who, event.request))
        heard = None if known is None else self._heard[event.who].get(known[0] + event.answer)
        group = self._groups[self._name_of(event) if heard is None else heard.group]
        self._last_at = max(self._last_at, event.at)
        self._forget(event)
        if event.reason == "cancelled":
            group.num_cancelled += 1
        elif event.reason == "error":
            group.num_failed += 1
        else:
            answer = Answer(
                arrived_at=event.arrived_at,
                admitted_at=event.admitted_at,
                first_token_at=event.first_token_at,
                last_token_at=event.last_token_at,
                num_prompt=event.num_prompt,
                num_cached=event.num_cached,
                num_output=event.num_output,
                num_preemptions=event.num_preemptions,
                num_recomputed=event.num_recomputed,
            )
            group.add(answer, self._slo or event.slo)

    def _on_ended(self, event: Ended) -> None:
        self._fleets.add(event.who)
        self._offers[event.who].end(event.request)
        self._seqs.pop((event.who, event.request), None)

    def _on_took(self, event: Took) -> None:
        """The gap around a movement is one like any other."""
        known = self._seqs.get((event.who, event.request))
        if known is not None and event.last_token_age_s is not None:
            self._heard[event.who][known[0]].last_at = event.at - event.last_token_age_s

    def _on_departed(self, event: Departed) -> None:
        """It was not offered here after all: where it goes on it arrived as well."""
        offers = self._offers[event.who]
        entry = offers.open.pop(event.request, None)
        if entry is not None:
            tenant, name, num = entry
            offers.offered[tenant, name] -= num
        self._seqs.pop((event.who, event.request), None)
        self._heard[event.who].pop(event.seq, None)

    def _forget(self, event: Finished) -> None:
        who = event.who
        self._offers[who].open.pop(event.request, None)
        known = self._seqs.get((who, event.request))
        if known is None:
            return
        self._heard[who].pop(known[0] + event.answer, None)
        known[1] -= 1
        if not known[1]:
            del self._seqs[who, event.request]

    def figures(self, notes: tuple[str, ...] = ()) -> Figures:
        """The figures so far."""
        return figures_of(
            self._with_offers(),
            max(0.0, self._last_at - self._first_at),
            num_steps=self.num_steps,
            errors=self._errors(),
            notes=notes,
        )

    def _counted(self) -> list[_Offers]:
        """Of fleets, where there are any."""
        return [
            offers
            for who, offers in self._offers.items()
            if not self._fleets or who in self._fleets
        ]

    def _errors(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for offers in self._counted():
            found.update(offers.errors)
        return found

    def samples(self, name: Literal["ttft_s", "tpot_s", "e2e_s", "queue_s"]) -> list[float]:
        """Every measured value of one latency, for plots."""
        return [value for group in self._groups.values() for value in getattr(group, name)]

    def _with_offers(self) -> dict[tuple[str, str], Group]:
        """The groups, with what was offered where it was offered first."""
        groups = {name: Group() for name in self._groups}
        for name, group in self._groups.items():
            groups[name].merge(group)
        for offers in self._counted():
            for name, count in offers.offered.items():
                groups.setdefault(name, Group()).num_offered += count
            for name, count in offers.refused.items():
                groups[name].num_refused += count
            for name, count in offers.strangers.items():
                group = groups.setdefault(name, Group())
                group.num_offered += count
                group.num_refused += count
        return groups
