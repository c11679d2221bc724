"""How long nano-operations take side by side: what a device does with streams, events and an order in each stream.

There is a stream for each resource. A stream runs its nano-operations in a fixed order, of many layers one behind the
other; the head of a stream begins as soon as all that it waits for have ended. While a memory-bound kernel with the
share s and a network-bound one with s' run, a product goes on at 1 - s - s' of its speed and they at P(s) and P(s')
(cost.nano_sharing). A head whose share would make the sum more than 1 waits for the other to end.

    place   layers from the beginning of a layer's schedule to where a nano-operation stands; the order of a stream is
            by layer + place, so a place of 1.2 stands among those of the next layer

Nothing here is measured: it is arithmetic over stated times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.errors import BadConfig
from penstock.cost.nano_layer import RESOURCES, NanoOp, Resource, Wait, waits_of
from penstock.cost.nano_sharing import Sharing

PLAYED, STEADY = (
    9,
    (3, 6),
)  # layers: so many are played; between the ends of these two they keep one pace
EPSILON = 1e-12


@dataclass(frozen=True, slots=True)
class Schedule:
    """Nano-operations with their shares and places. Shares of products are not used: they take what is left."""

    ops: tuple[NanoOp, ...]
    shares: tuple[float, ...]
    places: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.ops) == len(self.shares) == len(self.places)

    @property
    def waits(self) -> list[Wait]:
        return waits_of(self.ops)

    def stream(self, resource: Resource) -> list[int]:
        """The nano-operations of a resource in the order of a layer."""
        mine = [number for number, op in enumerate(self.ops) if op.resource == resource]
        return sorted(mine, key=lambda number: (self.places[number], number))


@dataclass(frozen=True, slots=True)
class Span:
    """A nano-operation ran. Seconds from the beginning."""

    number: int
    layer: int
    start: float
    end: float


class _Stream:
    __slots__ = ("head", "left", "queue", "running")

    def __init__(self, queue: list[tuple[int, int]]) -> None:
        self.queue, self.head = queue, 0
        self.running: tuple[int, int, float] | None = None  # number, layer, start
        self.left = 0.0


class Player:
    """Plays layers of one schedule; what does not depend on the times is made once."""

    def __init__(self, schedule: Schedule, sharing: Sharing) -> None:
        self.schedule, self.layers = schedule, PLAYED
        layers = PLAYED
        ops = schedule.ops
        self._share = [
            0.0 if op.resource == "compute" else share
            for op, share in zip(ops, schedule.shares, strict=True)
        ]
        self._speed = [
            1.0 if op.resource == "compute" else sharing.speed(op.resource, share)
            for op, share in zip(ops, schedule.shares, strict=True)
        ]
        self._queues = [self._queue(resource) for resource in RESOURCES]
        self._later: list[list[tuple[int, int]]] = [[] for _ in ops]
        self._needs = [[0] * layers for _ in ops]
        for sooner, later, apart in schedule.waits:
            self._later[sooner].append((later, apart))
            for layer in range(apart, layers):
                self._needs[later][layer] += 1

    def _queue(self, resource: Resource) -> list[tuple[int, int]]:
        mine = self.schedule.stream(resource)
        keyed = [
            (layer + self.schedule.places[number], place, number, layer)
            for layer in range(self.layers)
            for place, number in enumerate(mine)
        ]
        return [(number, layer) for _, _, number, layer in sorted(keyed)]

    def spans(self, seconds: Sequence[float]) -> list[Span]:
        """When each ran. Raises BadConfig for an order in which streams wait for each other for ever."""
        needs = [list(each) for each in self._needs]
        streams = [_Stream(queue) for queue in self._queues]
        found: list[Span] = []
        now, num_left = 0.0, self.layers * len(self.schedule.ops)
        while num_left:
            self._begin(streams, needs, seconds, now)
            running = [each for each in streams if each.running is not None]
            if not running:
                raise BadConfig("nano-operations wait for each other in a circle")
            taken = sum(self._share[each.running[0]] for each in running if each.running)
            speeds = [self._rate(each, taken) for each in running]
            step = min(
                each.left / speed for each, speed in zip(running, speeds, strict=True) if speed > 0
            )
            now += step
            for each, speed in zip(running, speeds, strict=True):
                each.left -= step * speed
                if each.left <= EPSILON and each.running is not None:
                    number, layer, start = each.running
                    each.running = None
                    num_left -= 1
                    found.append(Span(number, layer, start, now))
                    for later, apart in self._later[number]:
                        if layer + apart < self.layers:
                            needs[later][layer + apart] -= 1
        return found

    def _rate(self, stream: _Stream, taken: float) -> float:
        assert stream.running is not None
        number = stream.running[0]
        if self.schedule.ops[number].resource == "compute":
            return max(0.0, 1.0 - taken)
        return self._speed[number]

    def _begin(
        self,
        streams: Sequence[_Stream],
        needs: Sequence[Sequence[int]],
        seconds: Sequence[float],
        now: float,
    ) -> None:
        """Start the heads that can."""
        taken = sum(self._share[each.running[0]] for each in streams if each.running)
        for stream in streams:
            if stream.running is not None or stream.head == len(stream.queue):
                continue
            number, layer = stream.queue[stream.head]
            if needs[number][layer] or taken + self._share[number] > 1 + EPSILON:
                continue
            taken += self._share[number]
            stream.running = (number, layer, now)
            stream.left = seconds[number]
            stream.head += 1

    def layers_s(self, seconds: Sequence[float], num_layers: int) -> float:
        """Seconds of so many layers: fill and drain as played, the layers beyond PLAYED at the steady pace."""
        ends = self._ends(seconds)
        if num_layers <= self.layers:
            return ends[num_layers - 1]
        return ends[-1] + (num_layers - self.layers) * _pace_s(ends)

    def pace_s(self, seconds: Sequence[float]) -> float:
        """Seconds that each further layer takes."""
        return _pace_s(self._ends(seconds))

    def _ends(self, seconds: Sequence[float]) -> list[float]:
        ends = [0.0] * self.layers
        for span in self.spans(seconds):
            ends[span.layer] = max(ends[span.layer], span.end)
        return ends


def _pace_s(ends: Sequence[float]) -> float:
    first, last = STEADY
    return (ends[last] - ends[first]) / (last - first)
