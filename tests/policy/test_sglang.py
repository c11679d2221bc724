"""SGLang's batches, worked by hand from its rules: blocks of 4 positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from penstock.policy.batch import STABLE
from penstock.policy.batch.sglang import Sglang
from tests.laws.model_ledger import ModelLedger
from tests.policy.world import CAPS, Line, Replica, make_job

LOWEST = 0.7 * 0.14


def replica(blocks: int, *, max_jobs: int = 100, **parameters: Any) -> Replica:
    caps = dataclasses.replace(CAPS, max_jobs=max_jobs)
    return Replica(Sglang(**parameters), ModelLedger(blocks, 4), evict="retract", caps=caps)


def ratio_of(it: Replica) -> float:
    return float(it.batching._ratio)


def test_prompts_run_alone_and_before_decodes() -> None:
    it = replica(100)
    it.start(make_job(0, 7, output=1, computed=7))
    it.waiting = [make_job(1, 9, max_tokens=5), make_job(2, 3, max_tokens=5)]
    assert it.step() == Line(((1, 9), (2, 3)), admitted=(1, 2))
    assert it.step() == Line(((0, 1), (1, 1), (2, 1)), stable_for=STABLE)


@pytest.mark.parametrize(("max_tokens", "starts"), [(277, True), (278, False)])
def test_admission_counts_a_share_of_what_running_jobs_may_write(
    max_tokens: int, starts: bool
) -> None:
    """400 positions. Job 0 holds 2 blocks and may write 100 more: 392 - 0.7 * 100 = 322 remain. A prompt of 40 and
    a block of reserve are 44, so its own rest must stay below 278."""
    it = replica(100)
    it.start(make_job(0, 7, output=1, computed=7, max_tokens=101))
    it.waiting = [make_job(1, 40, max_tokens=max_tokens)]
    assert it.plan().admitted == ((1,) if starts else ())


def test_rest_is_clipped() -> None:
    it = replica(100, clip_tokens=50)
    it.start(make_job(0, 7, output=1, computed=7, max_tokens=101))
    it.waiting = [make_job(1, 40, max_tokens=278)]
    assert it.plan().admitted == (1,)


def test_started_jobs_are_charged_whole() -> None:
    """Of 400 positions job 0 takes 40 and is promised 100; job 1 may use 260: 44 + 215 passes, 44 + 216 does not."""
    for max_tokens, admitted in ((215, (0, 1)), (216, (0,))):
        it = replica(100)
        it.waiting = [make_job(0, 40, max_tokens=100), make_job(1, 40, max_tokens=max_tokens)]
        assert it.plan().admitted == admitted


def test_full_until_somebody_leaves() -> None:
    """The ratio decays and the head would fit again, but it is not asked before a job ended."""
    it = replica(100, decay_steps=2)
    it.start(make_job(0, 7, output=1, computed=7, max_tokens=101))
    it.start(make_job(1, 3, output=1, computed=3, max_tokens=5))
    it.waiting = [make_job(2, 40, max_tokens=277)]
    lines = [it.step() for _ in range(6)]
    assert [line.admitted for line in lines] == [(), (), (), (), (2,), ()]
    assert lines[0] == Line(((0, 1), (1, 1)), stable_for=STABLE)
    assert [job.seq for job in it.ended] == [1]


def test_long_prompt_is_cut_at_a_block_and_goes_first_from_then_on() -> None:
    it = replica(100, chunk_tokens=10)
    it.start(make_job(0, 7, output=1, computed=7))
    it.waiting = [make_job(1, 25), make_job(2, 3, max_tokens=5)]
    assert it.step() == Line(((1, 8),), admitted=(1,))
    assert it.step() == Line(((1, 10),))
    assert it.step() == Line(((1, 7), (2, 3)), admitted=(2,))
    assert it.step().chunks == ((0, 1), (1, 1), (2, 1))


def test_prompt_is_charged_for_its_rest_when_its_last_piece_runs() -> None:
    """Job 1 finds 400 - 32 - 300 positions left and needs 4 + 4 + 90."""
    it = replica(100, chunk_tokens=12)
    it.waiting = [make_job(0, 30, max_tokens=300), make_job(1, 4, max_tokens=90)]
    assert [it.step().chunks for _ in range(3)] == [((0, 12),), ((0, 12),), ((0, 6),)]


def test_prompts_of_one_step_stay_below_the_input_limit() -> None:
    it = replica(1000, max_prefill_tokens=20)
    it.waiting = [make_job(0, 30), make_job(1, 3)]
    assert it.step().chunks == ((0, 30),)  # the first is taken whatever its size
    assert it.step().chunks == ((1, 3),)


def test_ratio_reaches_its_minimum_after_600_decode_steps() -> None:
    it = replica(1000)
    it.start(make_job(0, 7, output=1, computed=7, max_tokens=2000))
    for _ in range(300):
        it.step()
    assert ratio_of(it) == pytest.approx(0.7 - (0.7 - LOWEST) / 2)
    for _ in range(299):
        it.step()
    assert ratio_of(it) > LOWEST + 1e-6
    it.step()
    assert ratio_of(it) == pytest.approx(LOWEST)
    it.step()
    assert ratio_of(it) == LOWEST


def test_steps_run_as_one_decay_like_single_ones() -> None:
    one, many = replica(1000), replica(1000)
    for it in (one, many):
        it.start(make_job(0, 7, output=1, computed=7, max_tokens=2000))
    for _ in range(41):
        one.step()
    assert many.step().stable_for == STABLE
    job = many.running[0]
    job.num_output, job.computed = job.num_output + 39, job.computed + 39  # 40 steps in one launch
    many.ledger.reserve(job, job.computed)
    many.step()
    assert ratio_of(one) == ratio_of(many)


def test_ratio_after_a_retraction() -> None:
    """All at a border, nothing free, three blocks short. Job 2 has as little output as job 1 and a longer prompt:
    it leaves with three blocks, which is enough. (5 + 2 + 20 * 2) / (50 + 50 + 1)."""
    it = replica(7)
    it.start(make_job(0, 4, output=5, computed=8, max_tokens=50))
    it.start(make_job(1, 7, output=2, computed=8, max_tokens=50))
    it.start(make_job(2, 11, output=2, computed=12, max_tokens=50))
    assert it.step() == Line(((0, 1), (1, 1)), evicted=(2,))
    assert ratio_of(it) == pytest.approx(47 / 101)


def test_no_more_jobs_are_retracted_than_needed() -> None:
    """Two blocks short; the first victim gives one back and wants none any more."""
    it = replica(6)
    for seq in range(4):
        it.start(make_job(seq, 3, output=2, computed=4, max_tokens=9))
    assert it.step() == Line(((0, 1), (1, 1), (2, 1)), evicted=(3,))


def test_one_job_stays() -> None:
    it = replica(3)
    it.start(make_job(0, 3, output=6, computed=8, max_tokens=9))
    it.start(make_job(1, 3, output=2, computed=4, max_tokens=9))
    assert it.step() == Line(((0, 1),), evicted=(1,))


def test_last_decoding_job_takes_the_room_of_an_unfinished_prompt() -> None:
    it = replica(4, chunk_tokens=8)
    it.start(make_job(0, 3, output=6, computed=8, max_tokens=9))
    it.start(make_job(1, 12, computed=8, max_tokens=2))
    assert it.step() == Line(((0, 1),), evicted=(1,))


def test_unfinished_prompts_that_hold_all_memory_do_not_block_each_other() -> None:
    it = replica(4)
    it.start(make_job(0, 12, computed=8, max_tokens=2))
    it.start(make_job(1, 12, computed=8, max_tokens=2))
    assert it.step().evicted
    assert it.step().chunks


def test_idle_replica_starts_afresh_and_takes_any_job_that_fits() -> None:
    it = replica(10, decay_steps=1)
    it.waiting = [make_job(0, 4, max_tokens=9)]
    it.run()
    it.waiting = [make_job(1, 4, max_tokens=37)]  # 4 + 37 + 4 positions are more than 40
    assert it.plan().admitted == (1,)
    assert ratio_of(it) == 0.7


def test_slots_bound_admission() -> None:
    it = replica(100, max_jobs=2)
    it.waiting = [make_job(seq, 3, max_tokens=5) for seq in range(3)]
    assert it.step().admitted == (0, 1)
    assert it.step() == Line(((0, 1), (1, 1)), stable_for=STABLE)


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk_tokens"):
        Sglang(chunk_tokens=0)
    with pytest.raises(ValueError, match="range"):
        Sglang(init_ratio=1.5)
