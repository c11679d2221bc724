"""vLLM v1's schedule, worked by hand from its rules: blocks of 4 positions, small budgets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from penstock.core.types import Caps
from penstock.policy.batch import STABLE
from penstock.policy.batch.vllm_v1 import VllmV1
from tests.laws.model_ledger import ModelLedger
from tests.policy.world import CAPS, Line, Replica, make_job


def replica(
    blocks: int, *, caps: Caps = CAPS, evict: str = "recompute-last", **parameters: Any
) -> Replica:
    return Replica(VllmV1(**parameters), ModelLedger(blocks, 4), caps=caps, evict=evict)


def test_running_first_then_waiting_share_one_budget() -> None:
    it = replica(100, max_tokens=10)
    it.start(make_job(0, 7, output=1, computed=7))
    it.start(make_job(1, 30, computed=24))
    it.waiting = [make_job(2, 9), make_job(3, 2)]
    assert it.plan() == Line(((0, 1), (1, 6), (2, 3)), admitted=(2,))


def test_budget_is_never_above_the_executor_limit() -> None:
    it = replica(100, caps=dataclasses.replace(CAPS, max_batch_tokens=5))
    it.waiting = [make_job(0, 30)]
    assert it.plan().chunks == ((0, 5),)


def test_job_without_work_is_passed_over_and_the_walk_goes_on() -> None:
    it = replica(100, max_tokens=10)
    ahead = make_job(0, 7, output=1, computed=7)
    it.start(ahead)
    ahead.in_flight = 1
    it.start(make_job(1, 7, output=1, computed=7))
    assert it.plan().chunks == ((1, 1),)


def test_last_admitted_makes_room_and_nobody_starts_in_that_step() -> None:
    """Both at a border, no free block: the first takes the block of the second, which is not planned any more."""
    it = replica(3)
    it.start(make_job(0, 4, output=1, computed=4, max_tokens=5))
    it.start(make_job(1, 7, output=1, computed=7, max_tokens=5))
    it.waiting = [make_job(2, 1, max_tokens=1)]
    assert it.plan() == Line(((0, 1),), evicted=(1,))


def test_job_that_preempts_itself_stops_the_walk() -> None:
    """Job 1 is last when it lacks a block, so it is its own victim; its block stays unused in this step."""
    it = replica(3)
    it.start(make_job(0, 5, output=1, computed=5, max_tokens=5))
    it.start(make_job(1, 4, output=1, computed=4, max_tokens=5))
    assert it.plan() == Line(((0, 1),), evicted=(1,))


def test_victims_go_from_the_end_until_the_job_fits() -> None:
    """Job 0 needs two blocks at once; 3 and 2 leave, 1 stays and is planned after it."""
    it = replica(5, max_tokens=9)
    it.start(make_job(0, 12, computed=4, max_tokens=2))
    for seq in (1, 2, 3):
        it.start(make_job(seq, 3, output=1, computed=3, max_tokens=5))
    it.start(make_job(4, 2, output=1, computed=2, max_tokens=5))
    assert it.plan() == Line(((0, 8), (1, 1)), evicted=(4, 3))


def test_planned_victim_returns_its_tokens_to_the_budget() -> None:
    """Priority mode. Job 0 (least important) takes 8 of 10; job 1 lacks a block and takes it away: 2 + 8 tokens are
    left, job 1 keeps the 2 it was cut to, job 2 gets the returned 8."""
    it = replica(7, evict="recompute-priority", max_tokens=10, stops_on_self=False)
    it.start(make_job(0, 12, computed=4, priority=2))
    it.start(make_job(1, 9, computed=4))
    it.start(make_job(2, 20, computed=12))
    assert it.ledger.free == 2
    assert it.plan() == Line(((1, 2), (2, 8)), evicted=(0,))


@pytest.mark.parametrize(("stops", "planned"), [(True, ((0, 1),)), (False, ((0, 1), (2, 1)))])
def test_priority_mode_goes_on_behind_a_job_that_gave_up(stops: bool, planned: Any) -> None:
    it = replica(4, evict="recompute-priority", stops_on_self=stops)
    it.start(make_job(0, 5, output=1, computed=5, priority=0))
    it.start(make_job(1, 4, output=1, computed=4, priority=9))
    it.start(make_job(2, 3, output=1, computed=3, priority=1))
    assert it.plan() == Line(planned, evicted=(1,))


def test_priority_victim_is_the_largest_priority_then_the_latest_arrival() -> None:
    it = replica(4, evict="recompute-priority", stops_on_self=False)
    it.start(make_job(0, 4, output=1, computed=4, priority=1, arrived_at=0.0))
    it.start(make_job(1, 3, output=1, computed=3, priority=5, arrived_at=7.0))
    it.start(make_job(2, 3, output=1, computed=3, priority=5, arrived_at=8.0))
    it.start(make_job(3, 3, output=1, computed=3, priority=0, arrived_at=9.0))
    assert it.plan() == Line(((0, 1), (1, 1), (3, 1)), evicted=(2,))


def test_head_of_the_line_is_not_overtaken() -> None:
    it = replica(6)
    it.start(make_job(0, 15, output=1, computed=15, max_tokens=5))
    it.waiting = [make_job(1, 12, max_tokens=5), make_job(2, 1, max_tokens=1)]
    assert it.plan() == Line(((0, 1),), stable_for=STABLE)


def test_job_that_can_never_fit_is_refused_and_passed() -> None:
    it = replica(6)
    it.waiting = [make_job(0, 20, max_tokens=6), make_job(1, 20, max_tokens=5)]
    assert it.plan() == Line(((1, 20),), admitted=(1,), refused=(0,))


def test_whole_prompt_must_fit_even_if_the_chunk_is_small() -> None:
    it = replica(6, max_tokens=5)
    it.start(make_job(0, 15, output=1, computed=15, max_tokens=5))
    it.waiting = [make_job(1, 9, max_tokens=2)]
    assert it.plan().admitted == ()
    it.ledger.total = 7
    assert it.plan() == Line(((0, 1), (1, 4)), admitted=(1,))


def test_long_prefill_limit_counts_only_in_company() -> None:
    it = replica(100, long_prefill_tokens=6)
    it.waiting = [make_job(0, 30)]
    assert it.plan().chunks == ((0, 30),)
    it.waiting.append(make_job(1, 5))
    assert it.plan().chunks == ((0, 6), (1, 5))


def test_without_chunking_the_walk_stops_at_what_exceeds_the_budget() -> None:
    it = replica(100, max_tokens=10, is_chunked=False)
    it.waiting = [make_job(0, 8), make_job(1, 3), make_job(2, 1)]
    assert it.plan() == Line(((0, 8),), admitted=(0,))


def test_slots_bound_admission() -> None:
    it = replica(100, max_jobs=2)
    it.start(make_job(0, 7, output=1, computed=7))
    it.waiting = [make_job(1, 3), make_job(2, 3)]
    assert it.plan().admitted == (1,)
    it.start(make_job(3, 7, output=1, computed=7))
    assert it.plan() == Line(((0, 1), (3, 1)), stable_for=STABLE)


@pytest.mark.parametrize(("prompt", "computed_now"), [(9, 1), (8, 4), (11, 3)])
def test_full_prefix_hit_leaves_something_to_compute(prompt: int, computed_now: int) -> None:
    """At most known - 1 positions are taken from the cache, in whole blocks."""
    it = replica(10)
    blocks = [b"one", b"two"]
    earlier = make_job(0, 8, hashes=blocks, max_tokens=1)
    it.waiting = [earlier]
    it.run()
    it.waiting = [make_job(1, prompt, hashes=blocks, max_tokens=9)]
    assert it.plan().chunks == ((1, computed_now),)


def test_prefix_shared_within_one_step_is_computed_once() -> None:
    it = replica(10)
    it.waiting = [make_job(seq, 9, hashes=[b"one", b"two"], max_tokens=9) for seq in (0, 1)]
    assert it.step().chunks == ((0, 9), (1, 1))
    assert it.ledger.free == 10 - 2 - 2  # the shared blocks, and each one's last


def test_block_that_a_decode_fills_is_shared_in_the_same_step() -> None:
    """Two equal answers, one preempted: it adopts what the other's eighth position completes."""
    it = replica(10)
    blocks = [b"one", b"two"]
    it.start(make_job(0, 4, output=4, computed=7, max_tokens=9, hashes=blocks))
    it.waiting = [make_job(1, 4, output=6, max_tokens=9, hashes=blocks)]
    assert it.step() == Line(((0, 1), (1, 2)), admitted=(1,))


def test_victims_leave_one_by_one_and_no_more_than_needed() -> None:
    """Jobs 2 and 3 share a block that neither frees alone: asked for three blocks the evict policy names 1 too, but
    when 3 and 2 have left, three are free."""
    it = replica(5)
    it.start(make_job(0, 16, computed=4))
    it.start(make_job(1, 2, output=1, computed=2))
    it.start(make_job(2, 5, output=1, computed=5, hashes=[b"one"]))
    it.start(make_job(3, 5, output=1, computed=5, hashes=[b"one"]))
    assert it.ledger.free == 0
    assert it.plan() == Line(((0, 12), (1, 1)), evicted=(3, 2))


def test_a_life_under_memory_pressure_step_by_step() -> None:
    """4 blocks of 4, budget 8. A: prompt 6, 6 tokens. B: prompt 5, 4 tokens; worked on paper."""
    it = replica(4, max_tokens=8)
    it.waiting = [make_job(0, 6, max_tokens=6), make_job(1, 5, max_tokens=4)]
    assert it.run() == [
        Line(((0, 6), (1, 2)), admitted=(0, 1)),  # B cut to the budget left; A has its first token
        Line(((0, 1), (1, 3))),  # B takes the last free block
        Line(((0, 1), (1, 1)), stable_for=STABLE),
        Line(
            ((0, 1),), evicted=(1,)
        ),  # A's ninth position: B leaves, and does not return in this step
        Line(((0, 1),), stable_for=STABLE),  # B knows 7 and needs 2 blocks, 1 is free
        Line(((0, 1),), stable_for=STABLE),  # A's last token
        Line(((1, 7),), admitted=(1,)),  # prompt and output again in one go
        Line(((1, 1),), stable_for=STABLE),
    ]
    assert [job.num_output for job in it.ended] == [6, 4]
    assert it.ledger.free == 4


def test_plain_decodes_take_blocks_only_at_borders() -> None:
    it = replica(3)
    it.start(make_job(0, 4, output=2, computed=5, max_tokens=9))
    assert it.plan() == Line(((0, 1),), stable_for=STABLE)
    it.ledger.total = 2
    assert it.plan() == Line(((0, 1),), stable_for=STABLE)  # its position lies in a block it holds


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        VllmV1(max_tokens=0)
