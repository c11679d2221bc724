"""Everything a report says about one run, gathered while its events pass by: a sink for a live run, or fed from a log.

Memory: a few floats an answer (report.metrics), the answers under way (report.explain), at most a thousand bins a
replica (report.series), and the SLOWEST explanations; a log of millions of steps is read in one pass.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from penstock.core.errors import BadTrace
from penstock.core.events import Arrived, Event, Finished, Header, Opened, Refused, Stepped
from penstock.core.types import Slo
from penstock.report.causes import Explanation
from penstock.report.charts import cdf
from penstock.report.explain import Explainer
from penstock.report.made import MadeReplica, made_of
from penstock.report.metrics import Metrics
from penstock.report.movements import Movements
from penstock.report.offered import Offered
from penstock.report.series import Curve, Series
from penstock.report.summary import Figures

SLOWEST = 20
PER_OCTAVE = 64  # bins of end-to-end time, for the mean causes of slow and quick answers
LATENCIES = (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("E2E", "e2e_s"))
BANDS = (("quicker half", 0.5), ("next 40%", 0.9), ("next 9%", 0.99), ("slowest 1%", 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Answers between two percentiles of end-to-end time, and the mean seconds of each cause among them."""

    name: str
    num: int
    parts: dict[str, float]


def whole_band(bands: Sequence[Band]) -> Band:
    """All answers of some bands as one."""
    total = _Sum()
    for band in bands:
        total.add({cause: value * band.num for cause, value in band.parts.items()}, band.num)
    return Band(
        name="all",
        num=total.num,
        parts={cause: value / total.num for cause, value in total.parts.items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One run. `slo`: what all requests were promised, None when they were promised different things or nothing."""

    name: str
    figures: Figures
    headers: tuple[Header, ...]
    num_events: int
    num_replicas: int
    slo: Slo | None
    cdfs: dict[str, tuple[list[float], list[float]]]
    curves: list[Curve]
    width_s: float
    bands: list[Band]
    slowest: list[Explanation]
    asked: list[Explanation]
    refusals: dict[str, tuple[str, str]]  # code and why, of requests asked for
    offered: Offered
    block_sizes: frozenset[int]
    movements: Movements = field(default_factory=Movements)
    notes: tuple[str, ...] = ()

    @property
    def offered_per_s(self) -> float | None:
        """Answers asked for, a second of the time in which they arrived."""
        return self.offered.rate_per_s


@dataclass(slots=True)
class _Sum:
    num: int = 0
    parts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, parts: dict[str, float], num: int = 1) -> None:
        self.num += num
        for cause, value in parts.items():
            self.parts[cause] += value


class Collector:
    """Implements core.ports.Log. `asked`: requests to explain whatever their speed."""

    def __init__(self, name: str = "", *, asked: Collection[str] = ()) -> None:
        self.name = name
        self._asked = frozenset(asked)
        self._metrics, self._series = Metrics(), Series()
        self._explainer = Explainer(self._on_explained, focus=asked)
        self._offered = Offered()
        self._headers: list[Header] = []
        self._slos: set[Slo] = set()
        self._sizes: set[int] = set()
        self._replicas: set[str] = set()
        self._kept: list[Explanation] = []
        self._refusals: dict[str, tuple[str, str]] = {}
        self._heap: list[tuple[tuple[float, float], int, Explanation]] = []
        self._bins: defaultdict[int, _Sum] = defaultdict(_Sum)
        self._num_explained = self.num_events = 0

    def emit(self, event: Event) -> None:
        self.num_events += 1
        self._metrics.emit(event)
        self._explainer.emit(event)
        if isinstance(event, Stepped):
            self._series.add(event)
        elif isinstance(event, Arrived):
            self._offered.add(event)
            if len(self._slos) < 2:
                self._slos.add(event.slo)
        elif isinstance(event, Finished):
            self._series.leave(event)
            self._offered.end(event)
        elif isinstance(event, Header):
            self._headers.append(event)
        elif isinstance(event, Opened):
            self._on_opened(event)
        elif isinstance(event, Refused) and event.request in self._asked:
            self._refusals[event.request] = (event.code, event.why)

    def read(self, events: Iterable[Event]) -> Collector:
        """Take in all events; self, for chaining."""
        for event in events:
            self.emit(event)
        return self

    def _on_opened(self, event: Opened) -> None:
        if event.what == "fleet":
            self._offered.fleets.add(event.who)
            return
        self._replicas.add(event.who)
        try:
            made = made_of(event)
        except BadTrace:  # of another version: its memory is not known
            return
        assert isinstance(made, MadeReplica)
        self._series.open(event.who, made.num_blocks)
        size = made.spec.get("block_size")
        if isinstance(size, int):
            self._sizes.add(size)

    def _on_explained(self, told: Explanation) -> None:
        if told.request in self._asked:
            self._kept.append(told)
        if told.reason in ("cancelled", "error"):
            return
        self._num_explained += 1
        place = math.floor(math.log2(told.e2e_s) * PER_OCTAVE) if told.e2e_s > 0 else -(1 << 20)
        self._bins[place].add(told.parts)
        item = (told.severity, self._num_explained, told)
        if len(self._heap) < SLOWEST:
            heapq.heappush(self._heap, item)
        elif item > self._heap[0]:
            heapq.heapreplace(self._heap, item)

    def facts(self, notes: Iterable[str] = ()) -> Facts:
        """What was gathered. Requests asked for that have not ended are explained as far as they got."""
        known = {each.request for each in self._kept}
        left = [
            each for each in self._explainer.unfinished() if each.request in self._asked - known
        ]
        return Facts(
            name=self.name,
            figures=self._metrics.figures(),
            headers=tuple(self._headers),
            num_events=self.num_events,
            num_replicas=len(self._replicas),
            slo=next(iter(self._slos)) if len(self._slos) == 1 else None,
            cdfs={label: cdf(self._metrics.samples(name)) for label, name in LATENCIES},  # type: ignore[arg-type]
            curves=self._series.curves(),
            width_s=self._series.width_s,
            bands=self._bands(),
            slowest=[
                told for _, _, told in sorted(self._heap, key=lambda item: item[:2], reverse=True)
            ],
            asked=self._kept + left,
            refusals=self._refusals,
            offered=self._offered,
            block_sizes=frozenset(self._sizes),
            movements=self._explainer.movements,
            notes=tuple(notes),
        )

    def _bands(self) -> list[Band]:
        """Bins put together: an answer falls into the band in which its bin ends."""
        total = sum(each.num for each in self._bins.values())
        sums = {name: _Sum() for name, _ in BANDS}
        seen = 0
        for _, each in sorted(self._bins.items()):
            seen += each.num
            name = next(name for name, upto in BANDS if seen <= upto * total or upto == 1.0)
            sums[name].add(each.parts, each.num)
        return [
            Band(
                name=name,
                num=found.num,
                parts={key: value / found.num for key, value in found.parts.items()},
            )
            for name, found in sums.items()
            if found.num
        ]
