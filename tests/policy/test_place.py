"""Which placements are asked about, and which is taken."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.policy.place import Model, Parallel, Site, Unit, View, highest, law
from penstock.policy.place.colocated import Colocated
from penstock.policy.place.distserve import DistServe, pairs

OPT_66B = Model(
    name="opt-66b", heads=72, layers=64, weight_bytes=131.4e9, kv_bytes=2359296, device_bytes=75.8e9
)
OPT_13B = Model(
    name="opt-13b", heads=40, layers=40, weight_bytes=25.7e9, kv_bytes=819200, device_bytes=75.8e9
)


def view(model: Model, site: Site, capacity: dict[str, float] | None = None, **more: float) -> View:
    """A unit keeps its promises up to `capacity` of its way, a second and device."""
    known = capacity or {}

    def attains(unit: Unit, rate_per_s: float) -> bool:
        return rate_per_s <= known.get(unit.way, 1.0) * unit.devices

    return View(site=site, model=model, attains=attains, most=5.0, **more)


def published_pairs(model: Model, nodes: int, per_node: int) -> set[tuple[int, ...]]:
    """Low affinity, written anew from the publication's rules: (cross, tp_p, pp_p, tp_d, pp_d)."""
    tps = [tp for tp in range(1, model.heads + 1) if model.heads % tp == 0 and tp <= per_node]
    depths = [pp for pp in range(1, model.layers + 1) if model.layers % pp == 0]
    found = set()
    crosses = [pp for pp in depths if pp <= nodes]
    for cross, tp, pp, other_tp, other_pp in itertools.product(
        crosses, tps, range(1, per_node + 1), tps, range(1, per_node + 1)
    ):
        fits = tp * pp + other_tp * other_pp <= per_node
        if fits and cross * pp in depths and cross * other_pp in depths:
            found.add((cross, tp, pp, other_tp, other_pp))
    return found


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 2), (1, 4), (1, 8), (2, 4), (4, 2)])
def test_pairs_are_the_published_ones_that_hold_the_weights(nodes: int, per_node: int) -> None:
    site = Site(nodes=nodes, devices_per_node=per_node)
    for model in (OPT_13B, OPT_66B):
        found = {
            (u.cross, u.parallel.tp, u.parallel.pp, u.decode.tp, u.decode.pp)
            for u in pairs(view(model, site))
            if u.decode is not None
        }
        allowed = {
            (cross, tp, pp, other_tp, other_pp)
            for cross, tp, pp, other_tp, other_pp in published_pairs(model, nodes, per_node)
            if min(tp * cross * pp, other_tp * cross * other_pp) * 75.8e9 > model.weight_bytes
        }
        # Their depths within a node divide the layers by themselves too; ours only as a whole.
        strict = {
            pair for pair in found if model.layers % pair[2] == 0 and model.layers % pair[4] == 0
        }
        assert strict == {
            pair for pair in allowed if model.layers % pair[2] == 0 and model.layers % pair[4] == 0
        }
        assert found <= allowed


models = st.builds(
    Model,
    name=st.just("m"),
    heads=st.sampled_from([8, 12, 40, 72]),
    layers=st.sampled_from([12, 32, 40, 64]),
    weight_bytes=st.floats(1e9, 400e9),
    kv_bytes=st.floats(1e5, 3e6),
    device_bytes=st.floats(10e9, 80e9),
    degrees=st.sampled_from([None, (1, 2, 4), (2, 4, 8)]),
)
sites = st.builds(
    Site,
    nodes=st.integers(1, 3),
    devices_per_node=st.integers(1, 6),
    has_fast_links=st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(models, sites, st.sampled_from([None, 0.3, 7.0, 90.0]), st.floats(0.0, 4.0))
def test_whatever_is_placed_is_valid(
    model: Model, site: Site, demand: float | None, capacity: float
) -> None:
    for policy in (DistServe(), Colocated(), Colocated(chunk=512)):
        capacities = dict.fromkeys(
            ("disaggregated", "colocated", "chunked", "prefill", "decode"), capacity
        )
        seen = view(model, site, capacities, **({} if demand is None else {"demand_per_s": demand}))
        decision = policy.decide(seen)
        law(seen, decision)
        for tried in decision.tried:
            assert all(model.can_be(each) for each in tried.unit.instances())
        if decision.deployment is not None and demand is not None:
            room = site.devices - decision.deployment.devices
            # one more of a phase alone serves nobody
            is_full = room < sum(unit.devices for unit, _ in decision.deployment.groups)
            assert decision.deployment.rate_per_s >= demand or is_full


def test_fewest_devices_win_among_equals() -> None:
    found = DistServe().decide(view(OPT_13B, Site(devices_per_node=8))).deployment
    assert found is not None
    assert found.devices == 2
    assert str(found) == "1 x (prefill tp 1 + decode tp 1)"


def test_phases_that_are_searched_apart_are_balanced() -> None:
    """A prefill instance serves 3 a second and device, a decode instance 1: one to three."""
    site = Site(devices_per_node=8, has_fast_links=True)
    seen = view(OPT_13B, site, {"prefill": 3.0, "decode": 1.0})
    found = DistServe(tolerance=0.001).decide(seen).deployment
    assert found is not None
    assert [count for _, count in found.groups] == [1, 3]
    assert found.per_device == pytest.approx(0.75, rel=0.01)
    asked = view(OPT_13B, site, {"prefill": 3.0, "decode": 1.0}, demand_per_s=4.4)
    wanted = DistServe(tolerance=0.001).decide(asked).deployment
    assert wanted is not None
    assert [count for _, count in wanted.groups] == [2, 5]


def test_nothing_is_placed_where_no_rate_is_kept() -> None:
    nothing = dict.fromkeys(("disaggregated", "colocated"), 0.0)
    for policy in (DistServe(), Colocated()):
        decision = policy.decide(view(OPT_13B, Site(), nothing))
        assert decision.deployment is None
        assert "promise" in decision.why
        assert decision.tried


@given(st.floats(0.0, 5.0), st.sampled_from([0.25, 0.05, 0.01]), st.integers(1, 8))
def test_halving_ends_just_below_the_highest_rate(limit: float, tolerance: float, num: int) -> None:
    asked: list[tuple[float, bool]] = []

    def attains(rate_per_s: float) -> bool:
        asked.append((rate_per_s, rate_per_s <= limit * num))
        return asked[-1][1]

    found = highest(attains, 5.0, tolerance, num)
    assert found <= limit < found + tolerance + 1e-9 or limit == 5.0
    kept = [rate for rate, is_kept in asked if is_kept]
    missed = [rate for rate, is_kept in asked if not is_kept]
    assert kept == sorted(kept) and missed == sorted(missed, reverse=True)
    assert all(low < high for low in kept for high in missed)


def test_published_bisection_of_the_check_figure() -> None:
    """README of the publication's simulator: halving [0, 5] down to 0.25 prints 1.56 for any limit from 1.5625 on."""
    assert highest(lambda rate: rate <= 1.6 * 3, 5.0, 0.25, 3) == 1.5625


def test_instances_divide_the_model() -> None:
    assert not OPT_66B.can_be(Parallel(1, 1)), "132 GB of weights on one card"
    assert not OPT_66B.can_be(Parallel(5, 1)), "72 heads"
    assert OPT_66B.can_be(Parallel(2, 2))
