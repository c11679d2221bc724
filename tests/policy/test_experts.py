"""Placements of experts: against a solver, against published routing, and the law on anything."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from penstock.policy import find
from penstock.policy.move import Experts, Slots, View, law
from penstock.policy.move.elastic_moe import moved, reshape
from penstock.policy.move.eplb import copies, deal, peak

TASKS = ("intent", "law", "summary", "translation")
LAYERS = (2, 8, 14, 20, 26)


def contiguous(experts: int, devices: int) -> Slots:
    return tuple(tuple(each) for each in np.array_split(np.arange(experts), devices))


def ask(policy: str, experts: Experts) -> Slots | None:
    view = View(0.0, random.Random(0), [], {}, {}, experts=experts)
    decision = find("move", policy)().decide(view)
    law(view, decision)
    return decision.experts


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_reshape_moves_as_few_experts_as_any_even_placement(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 24))
    before, after = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    order = data.draw(st.permutations(range(count)))
    cuts = sorted(
        data.draw(st.lists(st.integers(0, count), min_size=before - 1, max_size=before - 1))
    )
    now = tuple(tuple(each.tolist()) for each in np.split(np.array(order), cuts))
    placed = reshape(Experts([1.0] * count, now, after, count))
    sizes = [len(device) for device in placed]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == count
    # Every way to give floor or ceiling many places to the devices, each solved as an assignment.
    least, more = divmod(count, after)
    best = count
    for larger in _choices(after, more):
        places = [device for device in range(after) for _ in range(least + (device in larger))]
        cost = np.ones((count, count))
        for place, device in enumerate(places):
            held = now[device] if device < before else ()
            cost[list(held), place] = 0
        rows, columns = linear_sum_assignment(cost)
        best = min(best, int(cost[rows, columns].sum()))
    assert moved(now, placed) == best


def _choices(count: int, size: int) -> list[set[int]]:
    from itertools import combinations

    return [set(each) for each in combinations(range(count), size)]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_dealing_keeps_the_law_and_what_need_not_move(data: st.DataObject) -> None:
    devices = data.draw(st.integers(1, 6))
    room = data.draw(st.integers(1, 6))
    count = data.draw(st.integers(1, devices * room))
    loads = data.draw(st.lists(st.floats(0, 100), min_size=count, max_size=count))
    asked = Experts(loads, (), devices, room)
    first = deal(asked)
    law(View(0.0, random.Random(0), [], {}, {}, experts=asked), _decision(first))
    again = deal(Experts(loads, first, devices, room))
    assert again == first  # nothing has changed, so nothing moves, not even to another slot
    assert sum(copies(loads, devices, room)) == sum(len(device) for device in first)


def _decision(slots: Slots):  # type: ignore[no-untyped-def]
    from penstock.policy.move import Decision

    return Decision(why="dealt", experts=slots)


def test_the_busiest_expert_gets_the_copy_and_small_gains_are_left_alone() -> None:
    loads = [8.0, 1.0, 1.0, 2.0]
    now = ((0, 1), (2, 3))
    placed = ask("eplb", Experts(loads, now, 2, 3))
    assert placed is not None and all(0 in device for device in placed)
    assert peak(loads, placed) < peak(loads, now) == 9.0
    assert ask("eplb", Experts([1.0, 1.0, 1.0, 1.02], now, 2, 2)) is None
    assert ask("eplb", Experts(loads, now, 1, 2)) is None  # no room: whoever asks is not answered
    assert ask("elastic-moe", Experts(loads, now, 2, 3)) is None  # the devices are those there are
    assert ask("elastic-moe", Experts(loads, now, 3, 3)) is not None


def counts_of(folder: Path, task: str, layer: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that each expert took in the first half of the sequences and in the second."""
    path = folder / "expert_traces" / f"{task}_layer{layer}.txt.gz"
    lines = gzip.open(path, "rt").read().splitlines()[:-1]
    ids = [np.array(line.split("\t\t")[0].split("\t"), dtype=int) for line in lines]
    half = len(ids) // 2
    first, second = (np.concatenate(part) for part in (ids[:half], ids[half:]))
    return np.bincount(first, minlength=64), np.bincount(second, minlength=64)


@pytest.mark.parametrize(("devices", "least"), [(8, 1.35), (16, 1.7)])
def test_published_routing_is_balanced_for_tokens_it_was_not_planned_on(
    penstock_data: Path, devices: int, least: float
) -> None:
    before, after = [], []
    for task in TASKS:
        for layer in LAYERS:
            plan, test = counts_of(penstock_data, task, layer)
            mean = test.sum() / devices
            now = contiguous(64, devices)
            placed = deal(Experts(plan.tolist(), now, devices, 64 // devices + 1))
            before.append(peak(test.tolist(), now) / mean)
            after.append(peak(test.tolist(), placed) / mean)
    assert np.mean(before) / np.mean(after) >= least
