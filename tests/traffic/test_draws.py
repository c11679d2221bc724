"""Small distributions against scipy's, and their bounds."""

from __future__ import annotations

import math
import random

import pytest

from penstock.core.config import Table
from penstock.core.errors import BadConfig
from penstock.traffic.draws import draw_of, whole

NUM = 4000
stats = pytest.importorskip("scipy.stats")


def drawn(**table: object) -> list[float]:
    draw, chance = draw_of(Table(table), "x"), random.Random(5)
    return [draw.draw(chance) for _ in range(NUM)]


def test_laws_are_what_their_names_say() -> None:
    sigma = math.sqrt(math.log1p(1.5**2))
    laws = [
        (drawn(kind="exponential", mean=7.0), stats.expon(scale=7.0)),
        (drawn(kind="uniform", low=2, high=9), stats.uniform(2, 7)),
        (
            drawn(kind="lognormal", mean=30.0, cv=1.5),
            stats.lognorm(sigma, scale=30.0 / math.sqrt(1 + 1.5**2)),
        ),
    ]
    for values, law in laws:
        assert stats.kstest(values, law.cdf).pvalue > 1e-3


def test_geometric_counts() -> None:
    values = drawn(kind="geometric", mean=3.5)
    law = stats.geom(1 / 3.5)
    for count in range(1, 8):
        share = law.pmf(count)
        assert abs(values.count(count) - NUM * share) < 4 * math.sqrt(NUM * share)
    assert set(drawn(kind="geometric", mean=1)) == {1.0}


def test_bounds_and_choices() -> None:
    cut = drawn(kind="geometric", mean=5, most=3)
    assert max(cut) == 3
    found = drawn(kind="choice", values=[1, 2], weights=[3, 1])
    assert abs(found.count(1) - NUM * 0.75) < 4 * math.sqrt(NUM * 0.1875)
    assert set(drawn(kind="fixed", value=2)) == {2}
    assert whole(draw_of(0.0, "x"), random.Random(1)) == 1


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"kind": "normal"}, "x.kind must be one of fixed"),
        ({"kind": "exponential"}, "lacks the key 'mean'"),
        ({"kind": "lognormal", "mean": 0.0, "cv": 1.0}, "must be positive"),
        ({"kind": "uniform", "low": 3, "high": 2}, "high not below low"),
        ({"kind": "uniform", "low": -3, "high": 2}, "must not be negative"),
        ({"kind": "fixed", "value": -1.0}, "must not be negative"),
        ({"kind": "choice", "values": [1.0, -1.0]}, "must not be negative"),
        ({"kind": "exponential", "mean": 1.0, "most": -1.0}, "most not below it"),
        ({"kind": "geometric", "mean": 2.0, "least": 3, "most": 2}, "most not below it"),
        ({"kind": "choice", "values": [1.0], "weights": [1.0, 2.0]}, "need as many weights"),
        ({"kind": "choice", "values": []}, "needs values"),
    ],
)
def test_mistakes_are_told(table: dict[str, object], said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        draw_of(Table(table), "x")
