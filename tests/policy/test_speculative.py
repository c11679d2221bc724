"""Guesses: as many as pay by the cost model, none where arithmetic is short, and what was seen is learned from."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from penstock.core.events import Completed, Drafted
from penstock.core.types import Caps, Job
from penstock.core.views import Chunk
from penstock.policy import TABLE, batch, find
from penstock.policy.batch.speculative import Speculative
from tests.laws.model_ledger import ModelLedger
from tests.policy.combination import Case, play
from tests.policy.test_combinations import circumstances, names
from tests.policy.world import CAPS, Replica, make_job

INNER = [name for name in TABLE["batch"] if name not in ("speculative", "diffusion", "semi-pd")]


class Line:
    """A step takes `fixed` seconds, and `each` for every row."""

    def __init__(self, fixed: float, each: float) -> None:
        self.fixed, self.each = fixed, each

    def predict(self, chunks: Sequence[Chunk], share: float = 1.0) -> float:
        return self.fixed + self.each * sum(chunk.tokens for chunk in chunks)


def decoding(num: int, *, most: int = 100, size: int = 16) -> Replica:
    replica = Replica(Speculative(), ModelLedger(50 * num, size))
    for seq in range(num):
        replica.start(make_job(seq, 5, output=3, computed=7, max_tokens=most, size=size))
    return replica


def granted(policy: Speculative, replica: Replica, cost: Line, caps: Caps = CAPS) -> dict[int, int]:
    view, _ = replica.view()
    view.cost, view.caps = cost, caps
    decision = policy.decide(view)
    batch.law(view, decision)
    chunks = [chunk for lane in decision.batch.lanes for chunk in lane.chunks]
    assert sorted(chunk.job.seq for chunk in chunks) == [job.seq for job in replica.running]
    return {one.job.seq: one.tokens - 1 for one in chunks if one.phase == "verify"}


def told(policy: Speculative, seq: int, drafted: int, right: int) -> None:
    policy.observe(Drafted(at=0, who="r", plan=0, guesses=((seq, drafted, right),)))


def test_rows_that_come_free_are_all_used_and_dear_ones_never() -> None:
    policy, replica = Speculative(max_drafts=3), decoding(2)
    assert granted(policy, replica, Line(1.0, 0.0)) == {0: 3, 1: 3}
    assert granted(policy, replica, Line(0.0, 1.0)) == {}


@pytest.mark.parametrize("each", [0.01, 0.03, 0.1, 0.2])
def test_with_load_guesses_fall_to_none(each: float) -> None:
    """On a device that a hundred rows keep busy, few jobs get guesses and many get none."""
    numbers = []
    for num in (1, 2, 4, 8, 16, 32, 64):
        grants = granted(Speculative(max_drafts=4), decoding(num), Line(1.0, each))
        numbers.append(sum(grants.values()) / num)
    assert numbers == sorted(numbers, reverse=True) and numbers[-1] < max(numbers[0], 1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_as_many_as_the_best_of_all_choices(seed: int) -> None:
    """Against every choice of guesses for three jobs of different luck."""
    rng = random.Random(seed)
    policy = Speculative(max_drafts=2, memory=1e9)
    cost = Line(1.0, rng.choice((0.02, 0.1, 0.2, 0.4)))
    replica = decoding(3)
    granted(policy, replica, Line(1.0, 0.0))  # it has met them
    rates = []
    for seq in range(3):
        for _ in range(300):
            told(policy, seq, 1, int(rng.random() < (0.15, 0.5, 0.95)[seq]))
    rates = [policy._rate(replica.running[seq]) for seq in range(3)]

    def speed(choice: Sequence[int]) -> float:
        worth = sum(
            rate**depth
            for rate, most in zip(rates, choice, strict=True)
            for depth in range(1, most + 1)
        )
        return (3 + worth) / (cost.fixed + cost.each * (3 + sum(choice)))

    best = max(itertools.product(range(3), repeat=3), key=speed)
    grants = granted(policy, replica, cost)
    assert speed([grants.get(seq, 0) for seq in range(3)]) == pytest.approx(speed(best))


def test_a_rate_is_learned_and_forgotten() -> None:
    policy, replica = Speculative(memory=16), decoding(1)
    granted(policy, replica, Line(1.0, 0.0))
    job = replica.running[0]
    for _ in range(60):
        told(policy, 0, 4, 4)
    assert policy._rate(job) > 0.85
    for _ in range(60):
        told(policy, 0, 4, 0)
    assert policy._rate(job) < 0.15


def test_only_guesses_that_were_looked_at_count() -> None:
    """Behind a wrong guess nobody looks: 1 right of 4 is one of two, as often as one likes."""
    policy, replica = Speculative(weight=1e-6), decoding(1)
    granted(policy, replica, Line(1.0, 0.0))
    for _ in range(200):
        told(policy, 0, 4, 1)
    assert policy._rate(replica.running[0]) == pytest.approx(0.5, abs=0.01)


def test_a_job_of_bad_guesses_is_tried_again_now_and_then() -> None:
    policy, replica = Speculative(probe_every=10), decoding(1)
    granted(policy, replica, Line(1.0, 0.0))
    for _ in range(100):
        told(policy, 0, 1, 0)
    job, asked = replica.running[0], 0
    for _ in range(40):
        job.num_output, job.computed = job.num_output + 1, job.computed + 1
        replica.ledger.reserve(job, job.computed)
        asked += len(granted(policy, replica, Line(1.0, 0.5)))
    assert asked == 4


@pytest.mark.parametrize(("times", "guesses"), [(1.0, True), (1.3, True), (3.5, False)])
def test_steps_that_turn_out_dearer_than_foretold_end_it(times: float, guesses: bool) -> None:
    """The cost model says that rows are free; measured, steps with guesses take `times` as long."""
    policy, replica = Speculative(max_drafts=2), decoding(1)
    for number in range(200):
        replica.now = float(number)
        grants = granted(policy, replica, Line(0.1, 0.0))
        if grants and number % 5:
            policy.observe(
                Drafted(at=0, who="r", plan=0, guesses=((0, 2, 2 if number % 10 else 0),))
            )
        spent = 0.1 * (times if grants and number % 5 else 1.0)
        policy.observe(
            Completed(at=0, who="r", plan=0, steps_run=1, ends=(number + spent,), outputs=())
        )
    assert policy._dearer == pytest.approx(times, rel=0.05)
    assert bool(granted(policy, replica, Line(0.1, 0.0))) == guesses


def test_who_always_guesses_stops_once_to_compare() -> None:
    policy, replica = Speculative(), decoding(1)
    without = 0
    for number in range(200):
        replica.now = float(number)
        if granted(policy, replica, Line(0.1, 0.0)):
            told(policy, 0, 4, 4)
        else:
            without += 1
        policy.observe(
            Completed(at=0, who="r", plan=0, steps_run=1, ends=(number + 0.1,), outputs=())
        )
    assert 3 <= without <= 8


def test_what_may_still_be_written_bounds_guesses() -> None:
    for left, most in ((1, {}), (2, {0: 1}), (3, {0: 2}), (9, {0: 4})):
        replica = decoding(1, most=3 + left)
        assert granted(Speculative(max_drafts=4), replica, Line(1.0, 0.0)) == most


def test_the_executors_rows_and_blocks_bound_guesses() -> None:
    caps = Caps(num_layers=2, max_context=10_000, max_batch_tokens=5)
    grants = granted(Speculative(max_drafts=4), decoding(2), Line(1.0, 0.0), caps)
    assert sum(grants.values()) == 3
    replica = decoding(1)
    replica.ledger.total = 1  # a block of 16, of which 8 are taken with this step
    assert granted(Speculative(max_drafts=20), replica, Line(1.0, 0.0)) == {0: 8}


def test_nobody_waits_for_blocks_of_guesses() -> None:
    """While somebody waits, guesses stay inside the blocks that are held."""
    replica = decoding(1)
    replica.waiting.append(make_job(9, 16 * 49))
    assert granted(Speculative(max_drafts=20), replica, Line(1.0, 0.0)) == {0: 8}


def test_it_wraps_policies_of_one_lane() -> None:
    policy = Speculative()
    for name in ("semi-pd", "speculative"):
        with pytest.raises(ValueError, match="one lane"):
            policy.wrap(find("batch", name)())
    policy.wrap(find("batch", "flow-prefill")())
    assert policy.interrupts
    policy.wrap(find("batch", "vllm-v1")())
    assert not policy.interrupts and policy.hears == (Drafted, Completed)
    policy.wrap(find("batch", "jit")())
    assert set(policy.hears) > {Drafted, Completed}


def test_bad_parameters_are_refused() -> None:
    bad: list[dict[str, Any]] = [
        {"max_drafts": 0}, {"prior": 1.5}, {"weight": 0.0}, {"memory": 0.0}, {"probe_every": 0},
    ]  # fmt: skip
    for fields in bad:
        with pytest.raises(ValueError):
            Speculative(**fields)


def test_no_text_changes_whoever_plans(num: int = 30) -> None:
    """The replica on a memory of hashes: guesses right, wrong and missing, preempted, moved, cancelled, cut off."""
    drafted = right = preempted = 0
    for seed in range(num):
        rng = random.Random(f"guesses {seed}")
        others = {slot: rng.choice(names(slot)) for slot in ("order", "admit", "evict", "blocks")}
        told = circumstances(seed) | {"lanes": 1}
        case = Case(batch="speculative", inner=INNER[seed % len(INNER)], **others, **told)
        played = play(case)
        preempted += played.num_preemptions
        for event in played.of(Drafted):
            drafted += sum(one[1] for one in event.guesses)
            right += sum(one[2] for one in event.guesses)
    assert drafted > 200 and 0.2 < right / drafted < 0.9 and preempted > 10


@pytest.mark.slow
def test_no_text_changes_in_many_more() -> None:
    test_no_text_changes_whoever_plans(1500)


def test_a_job_is_left_alone() -> None:
    """Jobs are read, not written."""
    replica = decoding(2)
    before = [(job.num_output, job.computed, job.in_flight) for job in replica.running]
    granted(Speculative(), replica, Line(1.0, 0.0))
    assert before == [(job.num_output, job.computed, job.in_flight) for job in replica.running]
    assert isinstance(replica.running[0], Job)
