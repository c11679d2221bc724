"""The load that a variant carries, against hand-worked cases and numpy's interpolation."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.report.capacity import Capacity, Carried, capacity_of, carried, verdict


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=12), st.floats(0.05, 0.99))
def test_it_is_where_the_line_between_two_loads_crosses_the_goal(
    attained: list[float], goal: float
) -> None:
    attained = sorted(attained, reverse=True)
    loads = [float(i + 1) for i in range(len(attained))]
    found = capacity_of(dict(zip(loads, attained, strict=True)), goal)
    if attained[0] < goal:
        assert (found.load, found.low, found.high) == (None, None, 1.0)
    elif attained[-1] >= goal:
        assert (found.load, found.low, found.high) == (loads[-1], loads[-1], None)
    else:
        assert found.low is not None and found.high == found.low + 1
        at = int(found.low) - 1
        crossing = numpy.interp(-goal, [-attained[at], -attained[at + 1]], [found.low, found.high])
        assert found.load == pytest.approx(crossing)
        assert attained[at] >= goal > attained[at + 1]
    assert not found.holds_again


def test_a_load_that_holds_again_does_not_count_but_is_told() -> None:
    found = capacity_of({1.0: 1.0, 2.0: 0.8, 3.0: 0.95})
    assert (found.low, found.high, found.holds_again) == (1.0, 2.0, True)
    assert found.load == pytest.approx(1.5)


def rows(variant: str, *by_seed: dict[float, float]) -> list[dict[str, object]]:
    return [
        {"variant": variant, "load_kind": "rate", "load": load, "offered_per_s": load, "seed": seed}
        | {"attainment": share}
        for seed, attained in enumerate(by_seed)
        for load, share in attained.items()
    ]


def test_the_mean_over_seeds_and_each_seed() -> None:
    (found,) = carried(rows("a", {1.0: 1.0, 2.0: 0.8}, {1.0: 0.96, 2.0: 0.86}))
    assert found.by_seed[0].load == pytest.approx(1.5) and found.by_seed[1].load == pytest.approx(
        1.6
    )
    assert found.mean.load == pytest.approx(1 + 0.08 / 0.15)
    assert str(found) == "1.53/s (between 1 and 2), 1.5 to 1.6 over 2 seeds"


def test_points_that_failed_or_have_no_load_are_left_out() -> None:
    found = rows("a", {1.0: 1.0, 2.0: 0.8})
    del found[1]["attainment"]
    assert carried(found)[0].mean == Capacity(load=1.0, low=1.0, high=None)
    assert carried([{**each, "load_kind": None} for each in found]) == []


def told(**variants: list[dict[float, float]]) -> str:
    return verdict(
        [each for name, seeds in variants.items() for each in carried(rows(name, *seeds))]
    )


def test_who_carries_most() -> None:
    good, bad = {1.0: 1.0, 2.0: 0.8}, {1.0: 0.95, 2.0: 0.7}
    assert told(a=[good]) == ""
    assert told(a=[bad, bad], b=[good, good]).startswith(
        "b carries the most: 1.25x of a, with every one of 2"
    )
    assert "not known" in told(a=[bad], b=[good])
    mixed = told(a=[bad, good], b=[good, bad])
    assert mixed == "a and b carry the same in the mean, but not with every seed: no clear winner."
    better = told(a=[bad, good], b=[good, {1.0: 0.95, 2.0: 0.71}])
    assert "with 1 of 2 seeds only: no clear winner" in better
    full, none = {1.0: 1.0, 2.0: 0.99}, {1.0: 0.5, 2.0: 0.4}
    assert (
        told(a=[full], b=[full]) == "a and b hold the goal at every load tried: sweep higher loads."
    )
    assert "at least 1.33x of b" in told(a=[full], b=[good])
    assert told(a=[none], b=[none]).startswith("No variant holds")
    assert told(a=[none], b=[good]).startswith("b carries the most.")


def test_in_words() -> None:
    loads = {1.0: 1.0, 2.0: 0.8}
    capacity = capacity_of(loads)
    assert str(capacity) == "1.5/s (between 1 and 2)"
    assert str(capacity_of({1.0: 0.5})) == "less than 1/s, the lowest load tried"
    assert str(capacity_of({1.0: 0.95})) == "at least 1/s, the highest load tried"
    again = capacity_of({**loads, 3.0: 1.0})
    assert "held again" in str(Carried(variant="a", mean=again, by_seed={0: again}))


def test_a_point_that_failed_leaves_the_other_seeds_at_their_loads() -> None:
    """Seed 1 has no figure at the lowest load: its others are not moved down by one."""
    told = rows("a", {1.0: 1.0, 2.0: 1.0, 3.0: 0.8}, {1.0: 1.0, 2.0: 1.0, 3.0: 0.8})
    failed = [
        each | {"attainment": None} if (each["seed"], each["load"]) == (1, 1.0) else each
        for each in told
    ]
    (whole,), (found,) = carried(told), carried(failed)
    assert found.mean == whole.mean and found.mean.load == pytest.approx(2.5)


def test_equals_are_called_equal() -> None:
    same = {1.0: 1.0, 2.0: 0.8}
    assert verdict(carried([*rows("a", same), *rows("b", same)])) == "a and b carry the same."
