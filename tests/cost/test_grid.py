"""Interpolation on measured points, against scipy's and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.cost.grid import Grid, Grids, Line, blend, full_axes

AXES = ([1, 4, 16], [0, 10, 100, 1000], [2, 3, 50])


def test_a_grid_is_scipys_linear_one() -> None:
    scipy = pytest.importorskip("scipy.interpolate")
    chance = np.random.default_rng(5)
    values = chance.random([len(axis) for axis in AXES])
    points = {
        (a, b, c): float(values[i, j, k])
        for i, a in enumerate(AXES[0])
        for j, b in enumerate(AXES[1])
        for k, c in enumerate(AXES[2])
    }
    grid, theirs = Grid(AXES, points), scipy.RegularGridInterpolator(AXES, values)
    for at in zip(*(chance.uniform(axis[0], axis[-1], 200) for axis in AXES), strict=True):
        assert grid(*at) == pytest.approx(float(np.squeeze(theirs(at))), rel=1e-12)
    beyond = scipy.RegularGridInterpolator(AXES, values, bounds_error=False, fill_value=None)
    assert grid(20, 1200, 60) == pytest.approx(float(np.squeeze(beyond((20, 1200, 60)))), rel=1e-12)
    assert grid(0, -5, 1) == points[1, 0, 2]  # below the first points they are held


def test_a_line_has_pieces() -> None:
    line = Line({10: 1.0, 20: 2.0, 40: 3.0})
    assert [line(at) for at in (5, 10, 15, 30, 60)] == [1.0, 1.0, 1.5, 2.5, 4.0]
    assert [line.segment(at)[2] for at in (5, 10, 19, 20, 50)] == [10, 20, 20, 40, None]
    assert Line({7: 3.0})(1) == Line({7: 3.0})(99) == 3.0
    mixed = blend(line, Line({10: 0.0, 30: 4.0}), 0.25)
    assert [mixed(at) for at in (10, 20, 30)] == [0.75, 2.0, 2.875]


def test_axes_lose_what_is_not_measured_everywhere() -> None:
    points = [(a, b) for a in (1, 2, 3, 4) for b in (10, 20, 30)]
    points.remove((4, 30))
    points.append((9, 10))
    assert full_axes(points) in ([[1, 2, 3], [10, 20, 30]], [[1, 2, 3, 4], [10, 20]])
    assert full_axes(points[:9]) == [[1, 2, 3], [10, 20, 30]]


def test_two_densities_answer_where_they_reach() -> None:
    """A dense grid of large sizes and a coarse one of all: each where it was measured, the dense one first."""
    dense = {(a, b): 1.0 for a in (50, 60, 70, 80, 90) for b in (500, 600, 700, 800)}
    coarse = {(a, b): 2.0 for a in (1, 10, 100) for b in (1, 1000, 2000)}
    grids = Grids({**dense, **coarse})
    assert [grids(60, 650), grids(5, 650), grids(60, 100), grids(90.5, 900)] == [1.0, 2.0, 2.0, 2.0]
