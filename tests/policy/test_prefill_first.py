"""vLLM of late 2023, worked by hand from its rules: blocks of 4 positions, 20 tokens a prompt step."""

from __future__ import annotations

import dataclasses
from typing import Any

from penstock.policy.batch import STABLE
from penstock.policy.batch.prefill_first import PrefillFirst
from tests.laws.model_ledger import ModelLedger
from tests.policy.world import CAPS, Line, Replica, make_job


def replica(blocks: int, *, most: int = 1 << 20, **parameters: Any) -> Replica:
    caps = dataclasses.replace(CAPS, max_batch_tokens=most)
    batching = PrefillFirst(**{"max_tokens": 20, **parameters})
    return Replica(batching, ModelLedger(blocks, 4), admit="watermark", caps=caps)


def test_whole_prompts_go_before_decodes_and_nobody_overtakes() -> None:
    it = replica(100)
    it.start(make_job(0, 7, output=1, computed=7))
    it.waiting = [make_job(1, 12), make_job(2, 9), make_job(3, 3)]
    assert it.step() == Line(
        ((1, 12),), admitted=(1,)
    )  # 9 more are too many, and 3 may not overtake
    assert it.step() == Line(((2, 9), (3, 3)), admitted=(2, 3))
    assert it.step() == Line(((0, 1), (1, 1), (2, 1), (3, 1)), stable_for=STABLE)


def test_prompts_wait_for_the_memory_of_all_of_them() -> None:
    it = replica(6)
    it.start(make_job(0, 7, output=1, computed=7, max_tokens=9))
    it.waiting = [make_job(1, 17, max_tokens=2)]
    assert it.plan() == Line(((0, 1),), stable_for=STABLE)
    it.ledger.total += 2  # five blocks, and the watermark's
    assert it.plan() == Line(((1, 17),), admitted=(1,))


def test_decodes_preempt_the_last_and_it_comes_back_whole() -> None:
    it = replica(4)
    it.start(make_job(0, 8, output=1, computed=8, max_tokens=6))
    it.start(make_job(1, 7, output=1, computed=7, max_tokens=6))
    assert it.step() == Line(((0, 1),), evicted=(1,))
    lines = it.run()
    assert Line(((1, 8),), admitted=(1,)) in lines
    assert sorted(job.num_output for job in it.ended) == [6, 6]


def test_a_prompt_larger_than_a_step_is_computed_in_pieces_that_nothing_comes_between() -> None:
    it = replica(100, most=8)
    it.start(make_job(0, 7, output=1, computed=7))
    it.waiting = [make_job(1, 20), make_job(2, 3)]
    assert [it.step().chunks for _ in range(4)] == [((1, 8),), ((1, 8),), ((1, 4),), ((2, 3),)]
    assert it.step().chunks == ((0, 1), (1, 1), (2, 1))


def test_the_usual_budget_is_the_longest_context() -> None:
    it = replica(4000, max_tokens=None)
    it.waiting = [make_job(0, 9_000), make_job(1, 1_000), make_job(2, 1)]
    assert it.plan().chunks == ((0, 9_000), (1, 1_000))
    it.caps = dataclasses.replace(CAPS, max_context=100)
    it.waiting = [make_job(3, 1_000), make_job(4, 1_000), make_job(5, 90)]
    assert it.plan().chunks == ((3, 1_000), (4, 1_000))  # 2,048 at least
