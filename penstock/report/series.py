"""What replicas held over time, in few points: at most MAX_BINS bins, whose width doubles when they are used up.

A bin keeps the last and the greatest of running, waiting and blocks used among the decisions that fall into it, so that
a short peak is still seen in a long log. All replicas of a run share the grid of bins, so that they can be compared.
Decisions come before steps: answers that end in between are taken off, and an idle replica holds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.core.events import Finished, Stepped

MAX_BINS = 1000
MAX_REPLICAS = 8  # more curves than that are told as the least, the median and the greatest
Bin = tuple[int, int, int]


@dataclass(slots=True)
class _Track:
    """One replica. Each bin: greatest of each field in it, and the last."""

    total_blocks: int | None = None
    now: Bin = (0, 0, 0)
    peaks: dict[int, Bin] = field(default_factory=dict)
    lasts: dict[int, Bin] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One replica, or one rank among many. `memory` is the share of KV blocks in use, None where it is not known."""

    name: str
    at_s: list[float]
    running: list[int]
    waiting: list[int]
    memory: list[float] | None = None


class Series:
    """Fed with Stepped events in time order of each replica."""

    def __init__(self, width_s: float = 0.05, max_bins: int = MAX_BINS) -> None:
        self.width_s = width_s
        self._max_bins = max_bins
        self._start: float | None = None
        self._tracks: dict[str, _Track] = {}

    def open(self, who: str, total_blocks: int | None) -> None:
        self._tracks[who] = _Track(total_blocks)

    def add(self, event: Stepped) -> None:
        """A decision."""
        track = self._tracks.get(event.who)
        if track is None:
            track = self._tracks[event.who] = _Track()
        self._put(track, event.at, (event.num_running, event.num_waiting, -event.free_blocks))

    def leave(self, event: Finished) -> None:
        """An answer ended: one less runs, or waits if it never started."""
        track = self._tracks.get(event.who)
        if track is None or not track.peaks:
            return
        has_started = event.admitted_at is not None
        running, waiting, blocks = track.now
        running, waiting = max(0, running - has_started), max(0, waiting - (not has_started))
        is_idle = not (running or waiting)
        now = (0, 0, -(track.total_blocks or 0)) if is_idle else (running, waiting, blocks)
        self._put(track, event.at, now)

    def _put(self, track: _Track, at: float, now: Bin) -> None:
        if self._start is None:
            self._start = at
        index = int(max(0.0, at - self._start) / self.width_s)
        while index >= self._max_bins:
            self._double()
            index //= 2
        before = track.peaks.get(index, track.now if track.peaks else now)
        track.peaks[index] = _peak(before, now)
        track.lasts[index] = track.now = now

    def _double(self) -> None:
        self.width_s *= 2
        for track in self._tracks.values():
            peaks: dict[int, Bin] = {}
            for index, peak in track.peaks.items():
                before = peaks.get(index // 2)
                peaks[index // 2] = peak if before is None else _peak(before, peak)
            track.peaks = peaks
            track.lasts = {index // 2: last for index, last in sorted(track.lasts.items())}

    def curves(self) -> list[Curve]:
        """One for each replica that ever stepped, by name; of more than MAX_REPLICAS the least, median and greatest."""
        found = [_filled(track, self._num_bins()) for _, track in self._stepping()]
        names = [name for name, _ in self._stepping()]
        at_s = [(index + 0.5) * self.width_s for index in range(self._num_bins())]
        if len(found) > MAX_REPLICAS:
            names = ["least loaded replica", "median replica", "most loaded replica"]
            found = _ranks(found)
        return [
            Curve(
                name=name,
                at_s=at_s,
                running=[running for running, _, _ in bins],
                waiting=[waiting for _, waiting, _ in bins],
                memory=None if share is None else share,
            )
            for name, (bins, share) in zip(names, found, strict=True)
        ]

    def _stepping(self) -> list[tuple[str, _Track]]:
        return [(name, track) for name, track in sorted(self._tracks.items()) if track.peaks]

    def _num_bins(self) -> int:
        return 1 + max((max(track.peaks) for _, track in self._stepping()), default=-1)


def _peak(one: Bin, two: Bin) -> Bin:
    return max(one[0], two[0]), max(one[1], two[1]), max(one[2], two[2])


Filled = tuple[list[Bin], list[float] | None]


def _filled(track: _Track, num: int) -> Filled:
    """Every bin of a replica: its peak, or what was last said before it."""
    bins, last = [], (0, 0, -(track.total_blocks or 0))
    for index in range(num):
        bins.append(track.peaks.get(index, last))
        last = track.lasts.get(index, last)
    total = track.total_blocks
    share = None if not total else [round(1 + free / total, 4) for _, _, free in bins]
    return bins, share


def _ranks(found: Sequence[Filled]) -> list[Filled]:
    """In every bin and for every field the least, the median and the greatest of all replicas."""
    told: list[Filled] = []
    fields = [
        [sorted(column) for column in zip(*bins, strict=True)]
        for bins in zip(*(b for b, _ in found), strict=True)
    ]
    shares = [share for _, share in found if share is not None]
    ranked = [sorted(column) for column in zip(*shares, strict=True)]
    for place in (0, len(found) // 2, len(found) - 1):
        bins = [(columns[0][place], columns[1][place], columns[2][place]) for columns in fields]
        is_whole = len(shares) == len(found)
        told.append((bins, [column[place] for column in ranked] if is_whole else None))
    return told
