"""The constant dense batch by hand: blocks of 4 positions, small batches, answers known to have ended a step late."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest

from penstock.core.events import Finished
from penstock.core.types import Slo, StepTemplate
from penstock.lab.nano_offline import play_offline
from penstock.policy.batch import STABLE, Decision
from penstock.policy.batch.constant_dense import ConstantDense
from tests.laws.model_ledger import ModelLedger
from tests.policy.world import Line, Replica, make_job


def replica(blocks: int, **parameters: Any) -> Replica:
    return Replica(ConstantDense(**parameters), ModelLedger(blocks, 4))


def decision(it: Replica) -> Decision:
    return it.batching.decide(it.view()[0])


def ended(at: float, reason: Literal["stop", "length"] = "stop") -> Finished:
    return Finished(
        at=at, who="r", request="q", answer=0, reason=reason, arrived_at=0.0, admitted_at=0.0,
        first_token_at=0.0, last_token_at=at, num_prompt=1, num_cached=0, num_output=1,
        num_preemptions=0, tenant="", priority=0, slo=Slo(),
    )  # fmt: skip


def test_decodes_then_begun_prompts_then_waiting_ones_fill_the_batch() -> None:
    it = replica(100, max_tokens=12)
    it.start(make_job(0, 30, computed=24))
    it.start(make_job(1, 7, output=1, computed=7))
    it.start(make_job(2, 9, output=1, computed=9))
    it.waiting = [make_job(3, 2), make_job(4, 9)]
    assert it.plan() == Line(((1, 1), (2, 1), (0, 6), (3, 2), (4, 2)), admitted=(3, 4))


def test_more_decodes_than_the_batch_holds_take_it_in_order() -> None:
    it = replica(100, max_tokens=3)
    for seq in range(5):
        it.start(make_job(seq, 5, output=1, computed=5))
    it.waiting = [make_job(9, 4)]
    assert it.plan() == Line(((0, 1), (1, 1), (2, 1)))


def test_the_batch_stays_full_while_prompts_wait() -> None:
    it = replica(400, max_tokens=16, max_jobs=12)
    it.waiting = [make_job(seq, 11, max_tokens=6) for seq in range(60)]
    lines = it.run()
    sizes = [sum(tokens for _, tokens in line.chunks) for line in lines]
    last = max(at for at, line in enumerate(lines) if line.admitted)
    assert set(sizes[:last]) == {16}


def test_an_answer_that_ended_by_itself_costs_a_token_and_a_slot() -> None:
    it = replica(100, max_tokens=10, max_jobs=2)
    it.start(make_job(0, 7, output=1, computed=7))
    it.waiting = [make_job(1, 20)]
    assert it.plan().chunks == ((0, 1), (1, 9))
    it.batching.observe(ended(it.now))
    assert it.plan() == Line(((0, 1),))  # its slot is not free yet
    it.batching.max_jobs = 3
    assert it.plan().chunks == ((0, 1), (1, 8))
    it.now += 1.0  # a step later it is over
    assert it.plan().chunks == ((0, 1), (1, 9))


def test_ends_that_were_foreseen_or_lie_back_cost_nothing() -> None:
    it = replica(100, max_tokens=10, max_jobs=4)
    it.waiting = [make_job(0, 20)]
    it.now = 5.0
    it.batching.observe(ended(5.0, "length"))
    it.batching.observe(ended(4.0))
    assert it.plan().chunks == ((0, 10),)
    it.batching.observe(ended(5.0))
    it.batching.observe(ended(5.0))
    assert it.plan().chunks == ((0, 8),)
    assert decision(it).why == "2 ended late"
    it.batching.is_late = False
    on = ConstantDense(max_tokens=10, is_late=False)
    on.observe(ended(5.0))
    it.batching = on
    assert it.plan().chunks == ((0, 10),)


def test_decodes_alone_are_stable_and_outlast_those_who_end() -> None:
    it = replica(100)
    it.start(make_job(0, 7, output=1, computed=7))
    it.batching.observe(ended(it.now))
    said = decision(it)
    assert said.stable_for == STABLE and said.outlasts and not said.why


def test_who_waits_for_memory_is_asked_again_only_after_news() -> None:
    it = replica(3)
    it.start(make_job(0, 9, output=1, computed=9, max_tokens=3))
    it.waiting = [make_job(1, 9, max_tokens=3)]
    said = decision(it)
    assert said.stable_for == STABLE and said.why == "waits for memory"


def test_short_memory_preempts_the_last_admitted() -> None:
    it = replica(3)
    it.start(make_job(0, 4, output=1, computed=4, max_tokens=5))
    it.start(make_job(1, 7, output=1, computed=7, max_tokens=5))
    it.waiting = [make_job(2, 1, max_tokens=1)]
    assert it.plan() == Line(((0, 1),), evicted=(1,))


TEMPLATES = (StepTemplate(8, "two"), StepTemplate(16, "four"))


def with_templates(**parameters: Any) -> Replica:
    it = replica(100, **parameters)
    it.caps = dataclasses.replace(it.caps, templates=TEMPLATES)
    return it


@pytest.mark.parametrize(
    ("prompt", "named"), [(3, None), (4, "two"), (8, "two"), (9, "four"), (16, "four"), (17, None)]
)
def test_the_smallest_template_that_holds_a_batch_is_named_if_half_full(
    prompt: int, named: str | None
) -> None:
    it = with_templates()
    it.waiting = [make_job(0, prompt)]
    assert decision(it).batch.nano == named


@pytest.mark.parametrize(("prompt", "named"), [(3, "four"), (8, "four"), (2, None)])
def test_one_template_may_be_asked_for_and_how_full_it_must_be(
    prompt: int, named: str | None
) -> None:
    it = with_templates(nano="four", nano_from=3)
    it.waiting = [make_job(0, prompt)]
    assert decision(it).batch.nano == named
    it = replica(100, nano="four", nano_from=3)  # an executor that has none
    it.waiting = [make_job(0, prompt)]
    assert decision(it).batch.nano is None


def test_a_template_is_asked_for_again_when_jobs_have_ended() -> None:
    """Fewer tokens may need another template or none: whoever outlasts must not keep this one."""
    it = with_templates(nano_from=1)
    it.start(make_job(0, 7, output=1, computed=7))
    said = decision(it)
    assert said.batch.nano == "two" and not said.outlasts


@pytest.mark.parametrize("name", ["max_tokens", "max_jobs", "nano_from"])
def test_parameters_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ConstantDense(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("is_late", [True, False])
def test_late_ends_in_a_whole_replica_leave_room_for_their_tokens(is_late: bool) -> None:
    """Every answer ends by itself; with late ends a step computes as many tokens less as ended before it."""
    batch = {"name": "constant-dense", "max_tokens": 32, "max_jobs": 64, "is_late": is_late}
    played = play_offline([(9, 3)] * 150, {"batch": batch}, num_blocks=500)
    sizes = [step.num_tokens for step in played.steps]
    middle = sizes[len(sizes) // 4 : len(sizes) // 2]
    assert played.num_late == 150
    if is_late:  # of 11 tokens that a request computes, one more is left free
        assert sum(middle) / len(middle) == pytest.approx(32 * 11 / 12, rel=0.03)
    else:
        assert set(middle) == {32}
