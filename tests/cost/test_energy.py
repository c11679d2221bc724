"""Energy by hand, and the fits of the card catalogue against the measurements they stand for."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cost.energy import EnergyMeter, at_clock, energy_of
from penstock.cost.hardware import card_of
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import ModelShape, shape_of
from penstock.cost.step import features_of
from penstock.cost.work import work_of

H100, LLAMA = card_of("h100"), shape_of("llama-3.1-8b")
STEP = features_of([(999, 1, True)] * 64)


def test_a_launch_by_hand() -> None:
    meter = EnergyMeter(LLAMA, H100)
    meter.add(STEP, 1, 0.02)
    num_bytes, flops = work_of(LLAMA, STEP)
    watts = 27 + 628 * num_bytes / 0.02 / 3.35e12 + 657 * flops / 0.02 / 989e12
    assert meter.joules == pytest.approx(0.02 * watts)
    assert (meter.num_bytes, meter.flops, meter.busy_s) == (num_bytes, flops, 0.02)


def test_a_repeated_launch_counts_as_its_steps() -> None:
    """At even power; bytes and flops to the last one."""
    one, many = EnergyMeter(LLAMA, H100), EnergyMeter(LLAMA, H100)
    one.add(STEP, 50, 1.0)
    for step in range(50):
        many.add(STEP.grown(step), 1, 0.02)
    assert one.num_bytes == pytest.approx(many.num_bytes, rel=1e-12)
    assert one.flops == pytest.approx(many.flops, rel=1e-12)
    assert one.joules == pytest.approx(many.joules, rel=1e-9)
    assert one.num_steps == many.num_steps == 50


def test_power_never_exceeds_the_cards() -> None:
    meter = EnergyMeter(LLAMA, H100, tp=2)
    meter.add(features_of([(0, 8192, False)]), 1, 1e-3)
    assert meter.joules == pytest.approx(2 * 700 * 1e-3)
    assert meter.idle_watts == 2 * 27


def test_a_model_and_its_meter_agree() -> None:
    model, meter = Roofline(LLAMA, H100), EnergyMeter(LLAMA, H100)
    cost = model.step(STEP)
    meter.add(STEP, 1, cost.time_s)
    assert meter.joules == pytest.approx(cost.energy_j)


def test_a_fleet_pays_for_idle_time() -> None:
    meters = [EnergyMeter(LLAMA, H100) for _ in range(2)]
    meters[0].add(STEP, 1, 2.0)
    found = energy_of("f", meters, duration_s=10.0, output_tokens=500_000, price_h=7.2)
    assert found.idle_j == pytest.approx(27 * (8.0 + 10.0))
    assert found.joules == pytest.approx(found.idle_j + meters[0].joules)
    assert found.mean_watts == pytest.approx(found.joules / 10)
    assert found.joules_per_million_output == pytest.approx(2 * found.joules)
    assert found.dollars == pytest.approx(0.02)
    assert found.dollars_per_million_output == pytest.approx(0.04)
    assert found.power_source == "fit of h100"
    a100 = [EnergyMeter(LLAMA, card_of("a100-80g"))]
    scaled = energy_of("f", a100, duration_s=1.0, output_tokens=0, price_h=None)
    assert scaled.power_source == "h100's fit by TDP of a100-80g"
    assert scaled.dollars is None and scaled.joules_per_million_output is None


def test_what_is_not_known_is_none() -> None:
    found = energy_of("f", [], duration_s=10.0, output_tokens=9, price_h=None)
    assert set(dataclasses.asdict(found).values()) == {"f", None}


def test_a_lower_clock_slows_arithmetic_and_saves_energy() -> None:
    """Decodes hardly slow; prefills do, by 1/f where arithmetic bounds them. Both draw less."""
    slow = at_clock(H100, 0.6)
    assert at_clock(H100, 1.0) is H100
    decode, prefill = STEP, features_of([(0, 8192, False)])
    full, low = Roofline(LLAMA, H100), Roofline(LLAMA, slow)
    assert low.seconds(decode) < 1.05 * full.seconds(decode)
    assert 1.4 < low.seconds(prefill) / full.seconds(prefill) < 1 / 0.6
    for step in (decode, prefill):
        was, now = full.step(step), low.step(step)
        assert now.energy_j is not None and was.energy_j is not None
        assert now.energy_j / now.time_s < was.energy_j / was.time_s
        assert now.energy_j < was.energy_j


def test_the_h100_fit_spans_what_was_measured() -> None:
    """ML.ENERGY's runs of vLLM on H100: 0.61 of TDP at up to 12 sequences, 0.82-0.84 at 100 to 600 (medians)."""
    model = Roofline(LLAMA, H100)
    for num, low, high in ((8, 0.50, 0.85), (256, 0.70, 1.0)):
        cost = model.step(features_of([(899, 1, True)] * num))
        assert cost.energy_j is not None
        assert low < cost.energy_j / cost.time_s / H100.tdp_w <= high, num


steps_of = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(1, 300), st.booleans()), min_size=1, max_size=12
)


@given(
    pieces=steps_of,
    layers=st.sampled_from([None, 7]),
    shape=st.sampled_from([LLAMA, shape_of("mixtral-8x7b")]),
    seconds=st.floats(1e-3, 1.0),
)
def test_a_meter_remembers_nothing_wrong(
    pieces: list[tuple[int, int, bool]], layers: int | None, shape: ModelShape, seconds: float
) -> None:
    """Whatever it met before, a launch adds its work by the formulas and its energy by the card's law."""
    meter, features = EnergyMeter(shape, H100, tp=2), features_of(pieces, layers)
    meter.add(features_of([(0, features.num_tokens, True)], layers), 1, 0.01)  # as many tokens
    before = meter.num_bytes, meter.flops, meter.joules
    meter.add(features, 1, seconds)
    num_bytes, flops = work_of(shape, features)
    assert meter.num_bytes - before[0] == pytest.approx(num_bytes, rel=1e-9)
    assert meter.flops - before[1] == pytest.approx(flops, rel=1e-9)
    each = 2 * seconds
    watts = H100.watts(num_bytes / each / H100.bandwidth, flops / each / H100.flops)
    assert meter.joules - before[2] == pytest.approx(watts * each, rel=1e-9)
