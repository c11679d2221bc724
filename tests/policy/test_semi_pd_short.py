"""Two lanes where memory is short: who decodes, who waits, who leaves, by hand-made situations of one decision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from penstock.core.types import Job
from penstock.policy import batch, find
from penstock.policy.batch import STABLE
from tests.laws.model_ledger import ModelLedger
from tests.policy.world import CAPS, Replica, make_job

SIZE = 4
TWO = replace(CAPS, max_lanes=2, max_total_share=2.0)
PREFILL_RUNS = (0,)  # nobody observed what lane 0 does, so it is taken to prefill


def decoding(seq: int, *, output: int = 1, hashes: tuple[bytes, ...] = ()) -> Job:
    """Its blocks are full: one more position takes one more block."""
    told = {"output": output, "computed": SIZE + output - 1, "max_tokens": 8}
    return make_job(seq, SIZE, hashes=hashes, size=SIZE, **told)


def prompt(seq: int, computed: int, *, flies: int = 0) -> Job:
    job = make_job(seq, 28, computed=computed, size=SIZE)
    job.in_flight = flies
    return job


def decided(jobs: list[Job], num_blocks: int, busy: tuple[int, ...] = (), **caps: int) -> Any:
    """(chunks of each lane, who leaves, for how many steps), held to the law. Who is not computed at all waits."""
    world = Replica(
        find("batch", "semi-pd")(), ModelLedger(num_blocks, SIZE), evict="retract", caps=replace(TWO, **caps)
    )  # fmt: skip
    for job in jobs:
        assert world.ledger.reserve(job, job.computed + job.in_flight)
        (world.running if job.computed else world.waiting).append(job)
    view, _ = world.view()
    view.busy_lanes = busy
    decision = world.batching.decide(view)
    batch.law(view, decision)
    lanes = [[(c.job.seq, c.tokens) for c in lane.chunks] for lane in decision.batch.lanes]
    return lanes, [eviction.item.seq for eviction in decision.evicted], decision.stable_for


def test_decodes_that_just_fit_go_on_undisturbed() -> None:
    pair = [decoding(0), decoding(1)]
    assert decided(pair, 4, max_batch_tokens=2) == ([[(0, 1), (1, 1)]], [], STABLE)


def test_a_lone_answer_waits_for_what_the_other_lane_will_free() -> None:
    jobs = [prompt(0, 8, flies=16), decoding(1)]
    assert decided(jobs, 7, PREFILL_RUNS) == ([], [], 1)


def test_a_lone_answer_takes_the_room_of_a_prompt_that_nobody_computes() -> None:
    """Nor does anybody start in the other lane: who left comes first."""
    jobs = [prompt(0, 22), decoding(1), make_job(2, 3, max_tokens=1)]
    assert decided(jobs, 7) == ([[(1, 1)]], [0], 1)


def test_of_several_answers_one_leaves_though_the_other_lane_runs() -> None:
    jobs = [prompt(0, 8, flies=16), decoding(1, output=5), decoding(2)]
    assert decided(jobs, 9, PREFILL_RUNS) == ([[(1, 1)]], [2], 1)


def test_a_decision_that_lets_somebody_leave_is_not_repeated() -> None:
    assert decided([decoding(0, output=5), decoding(1)], 3) == ([[(0, 1)]], [1], 1)


def test_jobs_in_the_other_lane_never_leave() -> None:
    """Neither answer would free a block, as they share theirs: they give up rather than take the running prompt's."""
    jobs = [prompt(0, 8, flies=16), *(decoding(seq, hashes=(b"same",)) for seq in (1, 2))]
    lanes, evicted, _ = decided(jobs, 7, PREFILL_RUNS)
    assert sorted(evicted) == [1, 2] and lanes == []


def test_where_prompts_hold_all_memory_one_leaves_and_nothing_else_happens() -> None:
    """Not while the other lane runs, and not while one of them can go on."""
    pair = [prompt(0, 12), prompt(1, 16)]
    assert decided(pair, 7) == ([], [1], 1)
    assert decided([*pair, prompt(2, 8, flies=20)], 14, PREFILL_RUNS) == ([], [], 1)
    assert decided(pair, 8) == ([[(0, 4)]], [], 1)


def test_decode_steps_bring_the_ratio_down_and_retractions_set_it_anew() -> None:
    """What is expected of those who run decides who may start."""
    policy: Any = find("batch", "semi-pd")()
    world = Replica(policy, ModelLedger(100, SIZE), evict="retract", caps=TWO)
    world.start(decoding(0))
    before = policy._ratio
    world.step()
    assert policy._ratio < before
