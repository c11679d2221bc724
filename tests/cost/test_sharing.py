"""Lanes side by side: cores counted once, one memory for all. Against what water-filling and time slicing must give."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import BadConfig
from penstock.cost.hardware import card_of
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import shape_of
from penstock.cost.sharing import SHARINGS, Load, Sharing, max_min, sharing_of, speeds
from penstock.cost.step import StepCost, StepFeatures, features_of

FAIR = SHARINGS["fair"]
PARTS = (StepFeatures(1, 1, 1),)
demands = st.lists(st.floats(0, 1), min_size=1, max_size=6)


class Arithmetic:
    """1 s of arithmetic with all cores, `moved` bytes."""

    name, digest = "arithmetic", ""

    def __init__(self, moved: float = 0.0) -> None:
        self.moved = moved

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        return 1.0 / share

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        return [self.seconds(features, share)] * count

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost:
        return StepCost(self.seconds(features, share), None, self.moved, None)


class Memory(Arithmetic):
    """1 s of reading with 0.4 of the cores or more."""

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        return 1.0 / min(1.0, share / 0.4)


def load(model: Arithmetic, share: float) -> Load:
    return Load(model, PARTS, share, 1.0)


def test_the_textbook_example_of_max_min_fairness() -> None:
    assert max_min([2, 2.6, 4, 5], 10) == pytest.approx([2, 2.6, 2.7, 2.7])


@given(demands)
def test_everybody_gets_what_it_wants_up_to_one_level(wanted: list[float]) -> None:
    got = max_min(wanted)
    assert sum(got) == pytest.approx(min(1.0, sum(wanted)))
    level = max(got)
    for have, want in zip(got, wanted, strict=True):
        assert have == pytest.approx(min(want, level))


def test_arithmetic_in_parts_of_the_cores_does_not_meet() -> None:
    assert speeds(FAIR, [load(Arithmetic(), 0.6), load(Arithmetic(), 0.4)]) == [1.0, 1.0]


def test_promised_twice_cores_are_sliced() -> None:
    assert speeds(FAIR, [load(Arithmetic(), 1.0), load(Arithmetic(), 1.0)]) == [0.5, 0.5]
    fast, slow = speeds(FAIR, [load(Arithmetic(), 0.8), load(Arithmetic(), 1.0)])
    assert fast == pytest.approx(1 / 1.8) and slow == pytest.approx(1 / 1.8)


def test_two_readers_halve_the_memory() -> None:
    assert speeds(FAIR, [load(Memory(1.0), 0.5), load(Memory(1.0), 0.5)]) == [0.5, 0.5]


def test_a_small_demand_is_served_whole_and_the_reader_gets_the_rest() -> None:
    little, much = speeds(FAIR, [load(Arithmetic(0.5), 0.5), load(Memory(1.0), 0.5)])
    assert little == 1.0 and much == pytest.approx(0.75)  # it draws 0.5 bytes in 2 s


def test_alone_nobody_is_slowed_and_none_means_none() -> None:
    assert speeds(FAIR, [load(Memory(1.0), 1.0)]) == [1.0]
    assert speeds(SHARINGS["none"], [load(Memory(1.0), 1.0), load(Memory(1.0), 1.0)]) == [1.0, 1.0]


def test_few_cores_read_slowly_where_sharing_says_so() -> None:
    slow = Sharing(name="slow", full_bandwidth_share=0.8)
    assert speeds(slow, [load(Memory(1.0), 0.4)]) == [0.5]
    rubbing = Sharing(name="rubbing", friction=0.1)
    assert speeds(rubbing, [load(Arithmetic(), 0.5), load(Arithmetic(), 0.5)]) == [0.9, 0.9]


def test_few_rows_may_keep_their_efficiency() -> None:
    """112 decodes on an A100 wait for memory with all cores; with half of them too, if products stay efficient."""
    card = card_of("a100-80g")
    model, rate = Roofline(shape_of("llama-3.1-8b"), card), card.bandwidth * card.gemm_mbu
    kind = SHARINGS["optimistic"]
    decodes = (features_of([(450, 1, True)] * 112),)
    whole = model.seconds(decodes[0])
    (speed,) = speeds(kind, [Load(model, decodes, 0.5, rate)])
    assert speed > 1.5 and model.seconds(decodes[0], 0.5) / speed == pytest.approx(whole)
    many = (features_of([(450, 1, True)] * 400),)
    (speed,) = speeds(kind, [Load(model, many, 0.2, rate)])
    flops = model.step(many[0]).flops
    prompt = model.step(features_of([(0, 8192, True)]))
    assert flops and prompt.flops
    assert model.seconds(many[0], 0.2) / speed == pytest.approx(
        flops / (0.2 * prompt.flops / prompt.time_s), rel=1e-6
    )
    assert speeds(kind, [Load(model, decodes, 1.0, rate)]) == [1.0]


@given(st.integers(1, 9) | st.just(10), st.integers(1, 8192), st.integers(1, 200))
def test_a_real_card_never_gives_more_than_it_has(tenth: int, prompt: int, decodes: int) -> None:
    card = card_of("a100-80g")
    model, rate = Roofline(shape_of("llama-3.1-8b"), card), card.bandwidth * card.gemm_mbu
    x, y = tenth / 10, 1.0 if tenth == 10 else 1 - tenth / 10
    loads = [
        Load(model, (features_of([(0, prompt, True)]),), x, rate),
        Load(model, (features_of([(1000, 1, True)] * decodes),), y, rate),
    ]
    found = speeds(FAIR, loads)
    assert all(0 < speed <= 1 for speed in found)
    crowd = max(1.0, x + y)
    drawn = [one.alone(share / crowd)[1] for one, share in zip(loads, (x, y), strict=True)]
    scaled = [
        draw * speed * one.alone(share / crowd)[0] / one.alone(share)[0]
        for draw, speed, one, share in zip(drawn, found, loads, (x, y), strict=True)
    ]
    assert sum(scaled) <= 1 + 1e-9


def test_names_and_bounds() -> None:
    assert sharing_of("fair") is FAIR
    with pytest.raises(BadConfig, match="pessimistic"):
        sharing_of("fairer")
    with pytest.raises(BadConfig, match="friction"):
        Sharing(name="x", friction=1.0)
