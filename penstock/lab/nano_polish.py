"""Small changes to a pipeline, each played, kept when it makes a layer faster: what neither program of the search sees.

Phase 1 knows no interference and phase 2 keeps the order of events. Between them lie changes of one thing at a time:
another share for a nano-operation, a grain of tokens moved between neighbouring pieces, two neighbours of a stream
swapped. The first improvement is kept, until a whole round has none.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from penstock.core.errors import BadConfig
from penstock.cost.nano_layer import RESOURCES, LayerTimes, Load, Split, nano_ops, seconds_of
from penstock.cost.nano_play import Player, Schedule
from penstock.cost.nano_sharing import Sharing

GRAIN = 128  # tokens: products run in tiles of so many rows
BETTER = 1e-4


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A split and the schedule of its nano-operations."""

    split: Split
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class Task:
    """What pipelines are made for."""

    load: Load
    times: LayerTimes
    sharing: Sharing

    def seconds(self, pipeline: Pipeline) -> list[float]:
        return seconds_of(pipeline.schedule.ops, self.load, self.times)

    def pace_s(self, pipeline: Pipeline) -> float:
        """Seconds a layer; infinite where streams block each other."""
        try:
            return Player(pipeline.schedule, self.sharing).pace_s(self.seconds(pipeline))
        except BadConfig:
            return float("inf")


Change = tuple[
    str, int, float
]  # what is changed, of which nano-operation or piece, and to or by what


def polish(pipeline: Pipeline, task: Task, *, rounds: int = 4) -> tuple[Pipeline, float]:
    """The pipeline after all improving changes found in so many rounds, and its pace."""
    best, best_s = pipeline, task.pace_s(pipeline)
    changes = _changes(pipeline, task)
    for _ in range(rounds):
        before_s = best_s
        for change in changes:
            changed = _changed(best, change, task)
            pace_s = float("inf") if changed is None else task.pace_s(changed)
            if changed is not None and pace_s < best_s * (1 - BETTER):
                best, best_s = changed, pace_s
        if best_s > before_s * (1 - BETTER):
            break
    return best, best_s


def _changes(pipeline: Pipeline, task: Task) -> list[Change]:
    ops = pipeline.schedule.ops
    seconds = task.seconds(pipeline)
    found: list[Change] = [
        ("share", number, level)
        for number, op in enumerate(ops)
        if op.resource != "compute" and seconds[number] > 0
        for level in task.sharing.levels
    ]
    num_pieces = sum(map(len, pipeline.split.pieces))
    found += [("size", piece, by) for piece in range(num_pieces - 1) for by in (GRAIN, -GRAIN)]
    for resource in RESOURCES:
        num = sum(op.resource == resource for op in ops)
        found += [("order " + resource, place, 1) for place in range(num - 1)]
    return found


def _changed(pipeline: Pipeline, change: Change, task: Task) -> Pipeline | None:
    """None where there is no such change."""
    what, which, value = change
    schedule = pipeline.schedule
    if what == "share":
        if schedule.shares[which] == value:
            return None
        shares = (*schedule.shares[:which], value, *schedule.shares[which + 1 :])
        return Pipeline(pipeline.split, dataclasses.replace(schedule, shares=shares))
    if what == "size":
        split = _resized(pipeline.split, which, int(value))
        if split is None:
            return None
        ops = tuple(nano_ops(split, task.times.tp))
        return Pipeline(split, dataclasses.replace(schedule, ops=ops))
    return _swapped(pipeline, what.removeprefix("order "), which)


def _resized(split: Split, piece: int, by: int) -> Split | None:
    """`by` tokens from the next piece to this one."""
    sizes = [size for each in split.pieces for size in each]
    sizes[piece] += by
    sizes[piece + 1] -= by
    if min(sizes) < GRAIN:
        return None
    left = iter(sizes)
    return Split(tuple(tuple(next(left) for _ in each) for each in split.pieces))


def _swapped(pipeline: Pipeline, resource: str, place: int) -> Pipeline:
    """Two neighbours of a stream exchange their places."""
    schedule = pipeline.schedule
    mine = sorted(
        (place, number)
        for number, place in enumerate(schedule.places)
        if schedule.ops[number].resource == resource
    )
    (first, a), (second, b) = mine[place], mine[place + 1]
    places = list(schedule.places)
    places[a], places[b] = second, first if first < second else first - 1e-6
    return Pipeline(pipeline.split, dataclasses.replace(schedule, places=tuple(places)))
