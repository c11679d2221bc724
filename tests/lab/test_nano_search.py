"""The search for a pipeline against all pipelines of layers small enough for that, and against its bounds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.core.errors import BadConfig
from penstock.cost.hardware import card_of
from penstock.cost.nano_layer import (
    Load,
    NanoOp,
    Resource,
    Split,
    busy_s,
    nano_ops,
    seconds_of,
    sequential_s,
    waits_of,
)
from penstock.cost.nano_model import NanoModel
from penstock.cost.nano_play import Player, Schedule
from penstock.cost.nano_sharing import SHARINGS, Sharing
from penstock.cost.nano_times import RooflineTimes
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import PRESETS
from penstock.cost.step import StepFeatures
from penstock.lab import nano_search
from penstock.lab.nano_offline import mean_load, play_offline, tokens_per_s, under_way
from penstock.lab.nano_polish import Pipeline, Task, polish
from penstock.lab.nano_search import EFFORTS, Effort, Search, find_template, splits_of
from penstock.lab.nano_shares import best_shares, fluid_bound
from penstock.lab.nano_structure import Structure, best_structure

NONE, PAPER = SHARINGS["none"], SHARINGS["paper"]
LITTLE = Effort(name="little", shapes=((1,), (1, 1)), nodes=4000, polished=1, rounds=1)


def little_layer(*operators: str, parts: int = 2) -> list[NanoOp]:
    """Some of a layer's operators, each on `parts` ranges of one token."""
    return [NanoOp(name, part, part + 1) for name in operators for part in range(parts)]


def paces(ops: list[NanoOp], seconds: list[float], sharing: Sharing) -> Iterator[float]:
    """Of all orders of all streams, pieces of an operator in the order of their tokens and within a layer."""
    ways = []
    for resource in ("compute", "memory", "network"):
        mine = [number for number, op in enumerate(ops) if op.resource == resource]
        shifts = itertools.product((0, 1, 2), repeat=len(mine))
        found = set()
        for order, shift in itertools.product(itertools.permutations(mine), list(shifts)):
            places = {n: s + at / 10 for at, (n, s) in enumerate(zip(order, shift, strict=True))}
            sane = all(
                places[a] < places[b] < places[a] + 1
                for a, b in itertools.combinations(mine, 2)
                if ops[a].operator == ops[b].operator
            )
            if sane:
                found.add(tuple(places.items()))
        ways.append(sorted(found))
    for way in itertools.product(*ways):
        places = dict(pair for part in way for pair in part)
        schedule = Schedule(
            tuple(ops), (0.0,) * len(ops), tuple(places[n] for n in range(len(ops)))
        )
        try:
            yield Player(schedule, sharing).pace_s(seconds)
        except BadConfig:
            continue  # streams that block each other


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "operators", [("qkv", "decode attention"), ("decode attention", "out", "out sum")]
)
def test_phase_1_finds_the_best_of_all_orders(operators: tuple[str, ...], seed: int) -> None:
    ops = little_layer(*operators)
    rng = random.Random(seed)
    seconds = [rng.choice((0.2, 0.5, 1.0, 1.5)) for _ in ops]
    found = best_structure(ops, [seconds], waits_of(ops))
    best = min(paces(ops, seconds, NONE))
    assert found.period_s == pytest.approx(best, rel=3e-3)
    played = Player(Schedule(tuple(ops), (0.0,) * len(ops), found.places), NONE)
    assert played.pace_s(seconds) == pytest.approx(found.period_s, rel=3e-3)
    assert found.bound_s <= found.period_s * (1 + 1e-9)


def test_phase_1_chooses_the_better_candidate() -> None:
    ops = little_layer("qkv", "decode attention", "out")
    slow, fast = [1.0] * 6, [0.5] * 6
    found = best_structure(ops, [slow, fast], waits_of(ops))
    assert found.choice == 1 and found.period_s == pytest.approx(2.0, rel=1e-3)


def assert_possible(ops: list[NanoOp], seconds: list[float], found: Structure) -> None:
    """Played with these starts for ever, nobody begins early and no stream runs two at once."""
    period = found.period_s
    starts = [place * period for place in found.places]
    ends = [start + each for start, each in zip(starts, seconds, strict=True)]
    slack = 1e-5 * period
    for sooner, later, apart in waits_of(ops):
        assert starts[later] + apart * period >= ends[sooner] - slack
    for one, other in itertools.combinations(range(len(ops)), 2):
        if ops[one].resource == ops[other].resource:
            after = (starts[other] - starts[one] + slack) % period - slack
            assert seconds[one] - slack <= after <= period - seconds[other] + slack


def chain_s(ops: list[NanoOp], seconds: list[float], token: int) -> float:
    """The way of one token through a layer, attention of one kind only."""
    mine: dict[str, float] = {}
    for op, each in zip(ops, seconds, strict=True):
        if op.first <= token < op.end:
            mine[op.operator] = each
    attention = max(mine.pop("decode attention"), mine.pop("prefill attention"))
    return sum(mine.values()) + attention


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 1, 1)])
def test_phase_1_on_a_real_layer_keeps_its_bounds(shape: tuple[int, ...]) -> None:
    """No period beats what a resource has to do, or the way of a token; here it comes near the larger one.

    A token whose front is cut waits for the other pieces of its nano-batch besides, so not all the way.
    """
    task = real_task(NONE)
    split = splits_of(shape, 2048)[0]
    ops = nano_ops(split, 8)
    seconds = seconds_of(ops, task.load, task.times)
    found = best_structure(ops, [seconds], waits_of(ops))
    least = max(busy_s(ops, seconds).values())
    ways = max(chain_s(ops, seconds, token) for token in (0, 600, 1290, 1310, 2047))
    assert found.period_s >= max(least, ways) * (1 - 1e-9)
    assert found.period_s <= max(least, ways) * 1.05
    assert_possible(ops, seconds, found)


@pytest.mark.parametrize("seed", range(3))
def test_phase_2_and_polish_come_near_the_best_of_all_shares(seed: int) -> None:
    levels = (0.1, 0.3, 0.6)
    sharing = Sharing(name="three", memory=PAPER.memory, network=PAPER.network, levels=levels)
    ops = little_layer("qkv", "decode attention", "out", "out sum")
    rng = random.Random(seed)
    size: dict[Resource, float] = {"compute": 1.0, "memory": 0.25, "network": 0.2}
    seconds = [size[op.resource] * rng.uniform(0.5, 1.5) for op in ops]
    structure = best_structure(ops, [seconds], waits_of(ops))
    others = [number for number, op in enumerate(ops) if op.resource != "compute"]

    def with_shares(shares: tuple[float, ...]) -> Schedule:
        told = dict(zip(others, shares, strict=True))
        given = tuple(told.get(number, 0.0) for number in range(len(ops)))
        return Schedule(tuple(ops), given, structure.places)

    all_of_them = [
        Player(with_shares(shares), sharing).pace_s(seconds)
        for shares in itertools.product(levels, repeat=len(others))
    ]
    starts = [(level,) * len(others) for level in levels]
    found = [best_shares(with_shares(start), sharing, seconds)[1] for start in starts]
    plain = [Player(with_shares(start), sharing).pace_s(seconds) for start in starts]
    assert all(better <= start + 1e-9 for better, start in zip(found, plain, strict=True))
    assert min(found) >= min(all_of_them) - 1e-9
    assert min(found) <= 1.02 * min(all_of_them)
    assert min(all_of_them) >= fluid_bound(busy_s(ops, seconds), sharing) * (1 - 1e-6)


def test_fluid_bounds_by_hand() -> None:
    busy: dict[Resource, float] = {"compute": 1.0, "memory": 0.1, "network": 0.05}
    assert fluid_bound(busy, SHARINGS["time-slicing"]) == pytest.approx(1.15)
    assert fluid_bound(busy, NONE) == pytest.approx(1.0)
    # A tenth of the device gives a fifth of attention and three tenths of a sum; both fit beside the products.
    assert fluid_bound(busy, PAPER) == pytest.approx(1.0 + 0.1 * 0.1 / 0.25 + 0.1 * 0.05 / 0.4)
    assert fluid_bound({**busy, "memory": 9.0}, NONE) == pytest.approx(9.0)


LENGTHS = [(600, 400)] * 8


def real_task(sharing: Sharing) -> Task:
    plain = Roofline(PRESETS["llama-2-70b"], card_of("a100-80g"), tp=8)
    load = Load(
        decodes=1300,
        decode_context=1300 * 1024.0,
        prefills=748,
        num_prefills=2,
        pairs=748 * 300.0,
    )
    return Task(load, RooflineTimes(plain), sharing)


def test_search_on_a_real_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its bound and one operator after the other; found once, then read."""
    monkeypatch.setitem(EFFORTS, "quick", LITTLE)
    monkeypatch.setattr(nano_search, "STARTS", ())
    task, seen = real_task(PAPER), []
    made = find_template(
        task,
        model="llama-2-70b",
        card="a100-80g",
        effort="quick",
        cache=tmp_path,
        on_progress=lambda done, total, what: seen.append((done, total, what)),
    )
    assert made.bound_s <= made.period_s < made.uncut_s
    assert made.free_bound_s <= made.free_period_s * (1 + 1e-9)
    products = busy_s(*one_piece(task))["compute"]
    assert products <= made.free_period_s <= 1.05 * products
    assert seen[-1][0] == seen[-1][1] and made.search_s > 0
    monkeypatch.setattr(nano_search, "search", None)  # not asked again
    again = find_template(
        task, model="llama-2-70b", card="a100-80g", effort="quick", cache=tmp_path
    )
    assert again == made
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    monkeypatch.setattr(nano_search, "search", lambda *told, **more: made)
    kept_nowhere = find_template(task, model="l", card="a", effort="quick", cache=in_the_way / "in")
    assert kept_nowhere == made
    model = NanoModel(task.times.model, again)  # type: ignore[attr-defined]
    step = StepFeatures(2048, 1302, 0, 1300, 1300 * 1024, 1024, 2, 748 * 300)
    layers = 80 * made.period_s
    assert layers < model.layers_s(task.load) < layers + 2 * made.uncut_s  # fill and drain
    assert model.seconds(step) < model.plain.seconds(step)


def one_piece(task: Task) -> tuple[list[NanoOp], list[float]]:
    ops = nano_ops(Split(((task.load.tokens,),)), task.times.tp)
    return ops, seconds_of(ops, task.load, task.times)


def test_where_overlap_gives_nothing_the_batch_stays_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nano_search, "STARTS", ())
    task = real_task(SHARINGS["time-slicing"])
    pipeline, pace_s = Search(task, LITTLE).run()
    assert not pipeline.split.is_cut
    assert pace_s == pytest.approx(sequential_s(task.load, task.times))


def test_polish_never_makes_it_worse_and_keeps_the_batch() -> None:
    task = real_task(PAPER)
    split = Split(((640,), (1408,)))
    ops = tuple(nano_ops(split, 8))
    seconds = seconds_of(ops, task.load, task.times)
    structure = best_structure(ops, [seconds], waits_of(ops))
    start = Pipeline(split, Schedule(ops, (0.3,) * len(ops), structure.places))
    best, best_s = polish(start, task, rounds=1)
    assert best_s <= task.pace_s(start) and best.split.tokens == 2048
    assert best_s == pytest.approx(task.pace_s(best))


def test_splits_are_whole_grains_and_hold_the_batch() -> None:
    for shape in ((1,), (1, 1), (2, 2), (2, 1, 1), (1, 1, 1, 1)):
        for tokens in (1024, 1920, 2048):
            for split in splits_of(shape, tokens):
                assert split.tokens == tokens
                assert tuple(map(len, split.pieces)) == shape
    assert splits_of((1, 1, 1), 256) == []


def test_offline_steps_are_full_and_priced_alike() -> None:
    """A constant batch of 64 tokens; requests of 12 and 4 tokens."""
    lengths = [(12, 4)] * 200
    policy = {"batch": {"name": "constant-dense", "max_tokens": 64, "max_jobs": 100}}
    played = play_offline(lengths, policy, num_blocks=1000)
    assert len(played.names) == played.num_late == 200 and played.num_preemptions == 0
    assert played.num_tokens == 200 * 15  # the last token of an answer is not computed
    sizes = [step.num_tokens for step in played.steady]
    assert sum(sizes) / len(sizes) > 0.9 * 64 and max(sizes) <= 64
    plain = Roofline(PRESETS["llama-2-7b"], card_of("h100"))
    rate = tokens_per_s(played.steady, plain)
    assert rate == pytest.approx(sum(sizes) / sum(map(plain.seconds, played.steady)))


def test_the_load_of_a_full_batch_by_hand() -> None:
    load = mean_load([(600, 400)], 1000)
    assert (load.decodes, load.prefills) == (400, 600)
    assert load.decode_context == 400 * 800 and load.pairs == 600 * round(601 / 2)
    assert load.num_prefills == 2


def test_requests_under_way_are_met_by_the_length_of_their_answers() -> None:
    """Of answers of 1 and 99 tokens, 99 of 100 met are long ones, half done in the mean."""
    met = under_way([(10, 1), (10, 99)], 4000, seed=3)
    assert all(known + left in (11, 109) and left >= 1 for known, left in met)
    long = [left for known, left in met if known + left == 109]
    assert len(long) / len(met) == pytest.approx(0.99, abs=0.01)
    assert sum(long) / len(long) == pytest.approx(50, rel=0.05)
