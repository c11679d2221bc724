"""Figures from events, as they stream past: a sink for a live run, or fed from a log.

Definitions are those of `report.summary`. One clock a latency: all instants of a request come from the log of the
replica that served it. What is kept is a few floats an answer (exact percentiles) and, for the gaps between tokens,
a histogram (within 0.55%); nothing is kept a token.

Who was offered what: in a log with a fleet, the fleet's arrivals count (a replica's would count twice); in a replica's
own log, its arrivals. A refused request that a fleet sent elsewhere and that finished there is no refusal; so
refusals are counted where the request was offered.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Literal

from penstock.core.events import Arrived, Completed, Ended, Event, Finished, Refused, Stepped
from penstock.core.types import Slo
from penstock.report.summary import Answer, Figures, Group, class_name, figures_of
from penstock.report.timeline import Timeline

FLEET_KINDS = ("routed", "reported")


class _Offers:
    """What reached one fleet or replica, by tenant and class."""

    def __init__(self) -> None:
        self.offered: Counter[tuple[str, str]] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self.open: dict[str, tuple[str, str, int]] = {}  # refusable: arrived and not yet routed
        self.strangers = 0  # refused before they arrived


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
        self._errors: Counter[str] = Counter()
        self._last_token: dict[str, dict[int, float]] = defaultdict(dict)
        self._lanes: dict[tuple[str, int], tuple[str, str]] = {}
        self._seqs: dict[tuple[str, str], list[int]] = {}  # first seq, answers still open
        self.num_steps = 0
        self.timeline = Timeline()
        self._listeners = {
            "arrived": self._on_arrived,
            "refused": self._on_refused,
            "stepped": self._on_stepped,
            "completed": self._on_completed,
            "finished": self._on_finished,
            "ended": self._on_ended,
        }

    def emit(self, event: Event) -> None:
        listener = self._listeners.get(event.kind)
        if listener is not None:
            listener(event)  # type: ignore[operator]
        elif event.kind in FLEET_KINDS:
            self._fleets.add(event.who)

    def read(self, events: Iterable[Event]) -> Metrics:
        """Take in all events; self, for chaining."""
        for event in events:
            self.emit(event)
        return self

    def _on_arrived(self, event: Arrived) -> None:
        group = (event.tenant, class_name(event.priority, self._slo or event.slo))
        offers = self._offers[event.who]
        offers.offered[group] += event.n
        offers.open[event.request] = (*group, event.n)
        self._seqs[event.who, event.request] = [event.seq, event.n]
        self._first_at = min(self._first_at, event.at)
        self._last_at = max(self._last_at, event.at)
        if event.who not in self._fleets:
            for answer in range(event.n):
                self._lanes[event.who, event.seq + answer] = group

    def _on_refused(self, event: Refused) -> None:
        self._errors[event.code] += 1
        offers = self._offers[event.who]
        found = offers.open.pop(event.request, None)
        self._seqs.pop((event.who, event.request), None)
        if found is None:
            offers.strangers += 1
        else:
            tenant, name, num = found
            offers.refused[tenant, name] += num

    def _on_stepped(self, event: Stepped) -> None:
        if event.plan is None:
            return
        tokens = sum(tokens for _, tokens in event.chunks)
        self.timeline.add(event.who, event.at, event.num_running, event.num_waiting, tokens)

    def _on_completed(self, event: Completed) -> None:
        self.num_steps += event.steps_run
        if not self._has_gaps:
            return
        last, lanes, ends = self._last_token[event.who], self._lanes, event.ends
        start, end, num_ends, who = ends[0], ends[-1], len(ends), event.who
        first: dict[tuple[tuple[str, str], float], int] = {}  # gaps up to this completion
        inner: dict[tuple[tuple[str, str], int], int] = {}  # answers by the tokens they got in it
        for seq, tokens, _, _ in event.outputs:
            group = lanes.get((who, seq))
            if not tokens or group is None:
                continue
            before = last.get(seq)
            last[seq] = end
            if before is not None:
                gap = group, start - before
                first[gap] = first.get(gap, 0) + 1
            if tokens > 1:
                more = group, tokens
                inner[more] = inner.get(more, 0) + 1
        for (group, gap_s), count in first.items():
            self._groups[group].itl_s.add(gap_s, count)
        for (group, tokens), count in inner.items():
            found = self._groups[group].itl_s
            if num_ends > 1:
                found.add_gaps(ends, count)
            if tokens > num_ends:  # several tokens of one step come at once
                found.add(0.0, (tokens - num_ends) * count)

    def _on_finished(self, event: Finished) -> None:
        slo = self._slo or event.slo
        group = self._groups[event.tenant, class_name(event.priority, slo)]
        self._last_at = max(self._last_at, event.at)
        self._forget(event)
        if event.reason == "cancelled":
            group.num_cancelled += 1
            return
        if event.reason == "error":
            group.num_failed += 1
            return
        group.add(
            Answer(
                arrived_at=event.arrived_at,
                admitted_at=event.admitted_at,
                first_token_at=event.first_token_at,
                last_token_at=event.last_token_at,
                num_prompt=event.num_prompt,
                num_cached=event.num_cached,
                num_output=event.num_output,
                num_preemptions=event.num_preemptions,
            ),
            slo,
        )

    def _on_ended(self, event: Ended) -> None:
        self._fleets.add(event.who)
        self._offers[event.who].open.pop(event.request, None)
        self._seqs.pop((event.who, event.request), None)

    def _forget(self, event: Finished) -> None:
        self._offers[event.who].open.pop(event.request, None)
        known = self._seqs.get((event.who, event.request))
        if known is None:
            return
        seq = known[0] + event.answer
        self._last_token[event.who].pop(seq, None)
        self._lanes.pop((event.who, seq), None)
        known[1] -= 1
        if not known[1]:
            del self._seqs[event.who, event.request]

    def figures(self, notes: tuple[str, ...] = ()) -> Figures:
        """The figures so far."""
        return figures_of(
            self._with_offers(),
            max(0.0, self._last_at - self._first_at),
            num_steps=self.num_steps,
            errors=self._errors,
            notes=notes,
        )

    def samples(self, name: Literal["ttft_s", "tpot_s", "e2e_s", "queue_s"]) -> list[float]:
        """Every measured value of one latency, for plots."""
        return [value for group in self._groups.values() for value in getattr(group, name)]

    def _with_offers(self) -> dict[tuple[str, str], Group]:
        """The groups, with what was offered where it was offered first."""
        groups = {name: Group() for name in self._groups}
        for name, group in self._groups.items():
            groups[name].merge(group)
        for who, offers in self._offers.items():
            if self._fleets and who not in self._fleets:
                continue
            for name, count in offers.offered.items():
                groups.setdefault(name, Group()).num_offered += count
            for name, count in offers.refused.items():
                groups[name].num_refused += count
            if offers.strangers:
                stranger = groups.setdefault(("unknown", "unknown"), Group())
                stranger.num_offered += offers.strangers
                stranger.num_refused += offers.strangers
        return groups
