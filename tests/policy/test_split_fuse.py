"""Dynamic SplitFuse, worked by hand from FastGen's rules: blocks of 4 positions, forwards of 10 tokens."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from penstock.core.events import Stepped
from penstock.policy import find
from penstock.policy.batch import STABLE
from penstock.policy.batch.split_fuse import SplitFuse
from penstock.policy.batch.vllm_v1 import VllmV1
from penstock.policy.order.requeue import Requeue
from tests.laws.model_ledger import ModelLedger
from tests.policy.test_order import ranks
from tests.policy.world import CAPS, Line, Replica, crowd, make_job


def replica(blocks: int, **parameters: Any) -> Replica:
    return Replica(SplitFuse(**{"max_tokens": 10, **parameters}), ModelLedger(blocks, 4))


def decoding(seq: int, computed: int, **more: Any) -> Any:
    return make_job(seq, computed, output=1, computed=computed, **more)


def test_long_prompts_are_split_and_short_ones_fused() -> None:
    it = replica(100)
    it.start(decoding(0, 7))
    it.waiting = [make_job(1, 15), make_job(2, 3), make_job(3, 9)]
    assert it.step() == Line(((0, 1), (1, 9)), admitted=(1,))
    assert it.step() == Line(((0, 1), (1, 6), (2, 3)), admitted=(2,))  # the remainder is first
    assert it.step() == Line(((0, 1), (1, 1), (2, 1), (3, 7)), admitted=(3,))


def test_nobody_follows_a_prompt_that_was_cut() -> None:
    """vLLM would give the tenth token to job 2; FastGen has none left either, but never looks."""
    it = replica(100)
    it.waiting = [make_job(1, 10), make_job(2, 3)]
    assert it.step() == Line(((1, 10),), admitted=(1,))


def test_whole_prompts_must_fit_although_a_piece_would() -> None:
    it = replica(8)
    it.start(decoding(0, 7))
    it.waiting = [make_job(1, 25, max_tokens=2), make_job(2, 3)]
    assert it.plan() == Line(((0, 1),), stable_for=STABLE)
    it.waiting[0] = make_job(3, 24, max_tokens=2)
    assert it.plan() == Line(((0, 1), (3, 9)), admitted=(3,))


def test_the_rest_of_a_prompt_must_fit_too() -> None:
    """Of 9 blocks the decodes took those that the rest of job 1 needs: it waits for memory, and they go on."""
    it = replica(9)
    it.start(make_job(1, 20, computed=8, max_tokens=2))
    it.start(decoding(0, 19))
    assert it.plan() == Line(((0, 1),))
    it.ledger.total += 1
    assert it.plan() == Line(((0, 1), (1, 9)))


def test_a_decode_without_a_block_is_passed_over_until_nobody_can_go_on() -> None:
    it = replica(4)
    it.start(decoding(0, 8, max_tokens=9))
    it.start(decoding(1, 7, max_tokens=9))
    assert it.step() == Line(((1, 1),))
    assert it.step() == Line((), evicted=(1,))  # the last that holds memory
    assert it.step().chunks[0] == (0, 1)


def test_with_more_jobs_than_places_all_get_their_turn() -> None:
    it = replica(100, max_sequences=2)
    for seq in range(3):
        it.start(decoding(seq, 7))
        it.running[-1].last_token_at = float(-seq)
    assert it.step().chunks == ((2, 1), (1, 1))
    assert it.step().chunks[0] == (0, 1)


@pytest.mark.parametrize(
    ("prompt", "pieces"), [(15, [8, 7]), (21, [7, 7, 7]), (9, [9]), (95, [10])]
)
def test_even_pieces(prompt: int, pieces: list[int]) -> None:
    it = replica(100, splits_evenly=True)
    it.waiting = [make_job(0, prompt)]
    assert [it.step().chunks[0][1] for _ in pieces] == pieces


def test_even_pieces_leave_room_for_decodes() -> None:
    it = replica(100, splits_evenly=True)
    it.start(decoding(0, 7))
    it.waiting = [make_job(1, 10)]
    assert [it.step().chunks for _ in range(2)] == [((0, 1), (1, 5)), ((0, 1), (1, 5))]


@pytest.mark.parametrize("seed", range(5))
def test_it_is_vllm_v1_where_memory_suffices(seed: int) -> None:
    """Chunked prefill with one budget under another name, as long as nobody is preempted."""
    lines = []
    for batching in (SplitFuse(max_tokens=40), VllmV1(max_tokens=40, max_jobs=2048)):
        it = Replica(batching, ModelLedger(400, 4), caps=dataclasses.replace(CAPS, max_jobs=12))
        it.waiting = crowd(random.Random(seed), 30)
        lines.append(it.run())
    assert lines[0] == lines[1] and len(lines[0]) > 10


def stepped(at: float, *, evicted: tuple[int, ...] = (), admitted: tuple[int, ...] = ()) -> Stepped:
    return Stepped(
        at=at, who="r", plan=None, lane=0, digest="", repeat=1, chunks=(), admitted=admitted,
        evicted=evicted, num_running=0, num_waiting=0, free_blocks=0,
    )  # fmt: skip


def test_whoever_was_thrown_out_goes_behind_those_who_came_before_that() -> None:
    """Jobs 3 and 4 left at 5 s and 2 at 7 s; they stand at the head of the queue, the latest first."""
    policy = Requeue()
    policy.observe(stepped(5.0, evicted=(4, 3)))
    policy.observe(stepped(7.0, evicted=(2,)))
    queue = [make_job(seq, 5, arrived_at=0.0) for seq in (2, 3, 4)]
    queue += [
        make_job(seq, 5, arrived_at=at) for seq, at in ((5, 1.0), (6, 5.0), (7, 6.0), (8, 9.0))
    ]
    assert ranks(policy, queue) == [5, 6, 4, 3, 7, 2, 8]
    policy.observe(stepped(9.5, admitted=(3,)))
    assert ranks(policy, [each for each in queue if each.seq != 3]) == [5, 6, 4, 7, 2, 8]


def test_bad_parameters_are_named() -> None:
    for name in ("max_tokens", "max_sequences", "max_jobs"):
        with pytest.raises(ValueError, match=name):
            find("batch", "split-fuse")(**{name: 0})
