"""Measured steps from the log of a replica that served real requests.

The log says how many tokens each chunk had, not where it started. That follows from what it does say: the chunk with
which a job yields its n-th token ends at position num_prompt + n - 1, so chunks are placed backwards from there.
Chunks of jobs that were preempted or ended before they yielded anything cannot be placed; their steps are left out.
So are steps that ran beside another lane's, or with a part of the device: what these take depends on the other lane.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from penstock.core.events import Arrived, Completed, Event, Stepped, Suspended
from penstock.cost.step import StepFeatures, features_of
from penstock.lab.measure import MeasuredStep


class Cycle(NamedTuple):
    """From the turn that launched a step to the turn that heard of its end and could launch the next.

    `idle_s`: for how long the engine had nothing to do before.
    """

    features: StepFeatures
    seconds: float
    num_running: int
    num_waiting: int
    idle_s: float = 0.0


@dataclass(slots=True)
class _Step:
    """A launched plan; `starts` are filled as they become known.

    `is_whole`: every chunk passed all layers at once, nothing was suspended and no other lane ran, so that its seconds
    are a step's.
    """

    began_at: float
    chunks: tuple[tuple[int, int], ...]
    num_running: int
    num_waiting: int
    ends: tuple[float, ...] = ()
    turned_at: float = 0.0  # when the replica took note of its end
    samples: frozenset[int] = frozenset()
    starts: dict[int, int] = field(default_factory=dict)
    is_whole: bool = True
    is_running: bool = True


class LogSteps:
    """Takes in a replica's events in order; `steps()` gives what could be placed."""

    def __init__(self) -> None:
        self._open: dict[int, _Step] = {}
        self._lanes: dict[int, _Step] = {}  # what each runs, or ran last
        self._done: list[_Step] = []
        self._passing: set[int] = set()  # jobs with a chunk that has not passed all layers
        self._known: dict[int, int] = {}  # positions known of each job: prompt and yielded tokens
        self._unplaced: defaultdict[int, list[tuple[_Step, int]]] = defaultdict(list)

    def take(self, event: Event) -> None:
        if isinstance(event, Arrived):
            for answer in range(event.n):
                self._known[event.seq + answer] = event.num_prompt
        elif isinstance(event, Stepped):
            self._stepped(event)
        elif isinstance(event, Suspended):
            step = self._open[event.plan]
            step.is_whole = step.is_running = False
        elif isinstance(event, Completed):
            self._completed(event)

    def _stepped(self, event: Stepped) -> None:
        for seq in event.evicted:
            self._unplaced.pop(seq, None)
        if event.plan is None:
            return
        step = self._open[event.plan] = _Step(
            event.at, event.chunks, event.num_running, event.num_waiting
        )
        passing = self._passing | set(event.partial)
        step.is_whole = passing.isdisjoint([seq for seq, _ in event.chunks]) and event.share == 1
        for lane, other in self._lanes.items():
            if lane != event.lane and other.is_running:
                step.is_whole = other.is_whole = False
        self._lanes[event.lane] = step
        self._passing = (self._passing - {seq for seq, _ in event.chunks}) | set(event.partial)
        for seq, tokens in event.chunks:
            if seq not in event.partial:
                self._unplaced[seq].append((step, tokens))

    def _completed(self, event: Completed) -> None:
        step = self._open.pop(event.plan)
        step.is_running = False
        if event.error is not None:
            return
        step.ends, step.turned_at = event.ends, event.at
        step.samples = frozenset(seq for seq, tokens, _, _ in event.outputs if tokens)
        for seq, tokens, _, _ in event.outputs:
            if tokens:
                self._place(seq, self._known[seq])
                self._known[seq] += tokens
        self._done.append(step)

    def _place(self, seq: int, end: int) -> None:
        """The last chunk of the job ended at `end` in the first run of its step; the ones before it lie before it."""
        for step, tokens in reversed(self._unplaced.pop(seq, [])):
            end -= tokens
            step.starts[seq] = end

    def steps(self) -> list[MeasuredStep]:
        found = []
        for step, features in self._placed():
            began_at = step.began_at
            for run, end in enumerate(step.ends):
                if end > began_at:
                    found.append(MeasuredStep(features.grown(run), end - began_at))
                began_at = end
        return found

    def cycles(self) -> list[Cycle]:
        """Only of steps that were launched singly: of others nobody noted when each was over. Not the first of all."""
        found, free_at = [], {}
        for before, step in pairwise(self._done):
            free_at[id(step)] = before.turned_at
        for step, features in self._placed():
            seconds = step.turned_at - step.began_at
            if len(step.ends) == 1 and seconds > 0 and id(step) in free_at:
                idle_s = step.began_at - free_at[id(step)]
                found.append(Cycle(features, seconds, step.num_running, step.num_waiting, idle_s))
        return found

    def _placed(self) -> Iterator[tuple[_Step, StepFeatures]]:
        for step in self._done:
            if step.is_whole and all(seq in step.starts for seq, _ in step.chunks):
                pieces = [
                    (step.starts[seq], tokens, seq in step.samples) for seq, tokens in step.chunks
                ]
                yield step, features_of(pieces)


def steps_of_log(events: Iterable[Event]) -> dict[str, list[MeasuredStep]]:
    """Measured steps of every replica in a log."""
    found: defaultdict[str, LogSteps] = defaultdict(LogSteps)
    for event in events:
        if isinstance(event, (Arrived, Stepped, Suspended, Completed)):
            found[event.who].take(event)
    steps = {who: one.steps() for who, one in found.items()}
    return {who: some for who, some in steps.items() if some}


def cycles_of_log(events: Iterable[Event]) -> list[Cycle]:
    """Cycles of all replicas in a log."""
    found: defaultdict[str, LogSteps] = defaultdict(LogSteps)
    for event in events:
        if isinstance(event, (Arrived, Stepped, Suspended, Completed)):
            found[event.who].take(event)
    return [cycle for one in found.values() for cycle in one.cycles()]
