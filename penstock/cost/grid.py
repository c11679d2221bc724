"""Linear interpolation on measured points: one axis, and a full grid of several.

Kernels cost a floor plus something proportional to work, so time is close to linear in each size between two measured
sizes; interpolating logarithms bends that (leaving points out of published attention tables, 12-14 % error against
2-4 %). Below the first point of an axis its value is held; beyond the last the last slope goes on.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

Point = tuple[int, ...]


class Line:
    """y over x through measured points, x rising."""

    __slots__ = ("_x", "_y")

    def __init__(self, points: Mapping[int, float]) -> None:
        assert points, "a line through no points"
        self._x = sorted(points)
        self._y = [points[x] for x in self._x]

    def __call__(self, at: float) -> float:
        offset, slope, _ = self.segment(at)
        return offset + slope * at

    def segment(self, at: float) -> tuple[float, float, int | None]:
        """(offset, slope) of the piece that holds `at`, and where the next piece begins (None: nowhere)."""
        x, y = self._x, self._y
        index = bisect_right(x, at)
        if index == 0:
            return y[0], 0.0, x[0]
        if len(x) == 1:
            return y[0], 0.0, None
        end = min(index, len(x) - 1)
        slope = (y[end] - y[end - 1]) / (x[end] - x[end - 1])
        return y[end] - slope * x[end], slope, x[index] if index < len(x) else None

    @property
    def points(self) -> dict[int, float]:
        return dict(zip(self._x, self._y, strict=True))


def blend(first: Line, second: Line, weight: float) -> Line:
    """The line `weight` of the way from `first` to `second`, with the corners of both; weights beyond 1 continue."""
    corners = sorted({*first.points, *second.points})
    return Line({x: (1 - weight) * first(x) + weight * second(x) for x in corners})


class Grid:
    """Values on the product of some axes, all points measured."""

    def __init__(self, axes: Sequence[Sequence[int]], values: Mapping[Point, float]) -> None:
        self.axes = [sorted(axis) for axis in axes]
        strides, size = [], 1
        for axis in reversed(self.axes):
            strides.append(size)
            size *= len(axis)
        self._strides = strides[::-1]
        self._values = [0.0] * size
        for point in _product(self.axes):
            self._values[self._index(point)] = values[point]

    def _index(self, point: Sequence[int]) -> int:
        places = (axis.index(at) for axis, at in zip(self.axes, point, strict=True))
        return sum(place * stride for place, stride in zip(places, self._strides, strict=True))

    def __call__(self, *at: float) -> float:
        values = self._values
        corners = [(0, 1.0)]
        for axis, stride, where in zip(self.axes, self._strides, at, strict=True):
            low, weight = place_on(axis, where)
            if weight == 0.0:
                corners = [(index + low * stride, part) for index, part in corners]
                continue
            first, second = low * stride, (low + 1) * stride
            corners = [
                pair
                for index, part in corners
                for pair in ((index + first, part * (1 - weight)), (index + second, part * weight))
            ]
        return math.fsum([values[index] * part for index, part in corners])

    def holds(self, *at: float) -> bool:
        """Whether the point lies within the measured ranges."""
        return all(axis[0] <= where <= axis[-1] for axis, where in zip(self.axes, at, strict=True))


class Grids:
    """Points that were measured as several grids of different density: the largest that reaches so far answers.

    The first takes as many points as form a full product, the next what is left, while it is worth it.
    """

    def __init__(self, values: Mapping[Point, float], most: int = 3) -> None:
        left = dict(values)
        self.grids: list[Grid] = []
        while left and len(self.grids) < most:
            grid = Grid(full_axes(list(left)), left)
            if self.grids and any(len(axis) < 3 for axis in grid.axes):
                break
            self.grids.append(grid)
            taken = set(_product(grid.axes))
            left = {point: value for point, value in left.items() if point not in taken}

    def __call__(self, *at: float) -> float:
        for grid in self.grids:
            if grid.holds(*at):
                return grid(*at)
        reach = [sum(axis[0] <= x <= axis[-1] for axis, x in zip(grid.axes, at, strict=True))
                 for grid in self.grids]  # fmt: skip
        return self.grids[reach.index(max(reach))](*at)


def place_on(axis: Sequence[int], at: float) -> tuple[int, float]:
    """(index, weight): `at` lies `weight` of the way from axis[index] to the next; past the end weights exceed 1."""
    if at <= axis[0] or len(axis) == 1:
        return 0, 0.0
    low = min(bisect_right(axis, at), len(axis) - 1) - 1
    return low, (at - axis[low]) / (axis[low + 1] - axis[low])


def _product(axes: Sequence[Sequence[int]]) -> list[Point]:
    points: list[Point] = [()]
    for axis in axes:
        points = [(*point, at) for point in points for at in axis]
    return points


def full_axes(points: Sequence[Point]) -> list[list[int]]:
    """Axes whose whole product was measured: values are dropped, the least covered first, until nothing is missing."""
    points = list(points)
    while True:
        num_axes = len(points[0])
        axes = [sorted({point[axis] for point in points}) for axis in range(num_axes)]
        size = 1
        for values in axes:
            size *= len(values)
        if size == len(points):
            return axes
        cover: list[tuple[float, int, int]] = []
        for axis, values in enumerate(axes):
            counts = dict.fromkeys(values, 0)
            for point in points:
                counts[point[axis]] += 1
            cover += [(count * len(values) / size, axis, at) for at, count in counts.items()]
        _, axis, at = min(cover)
        points = [point for point in points if point[axis] != at]
