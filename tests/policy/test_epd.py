"""Answers, then prompts, then images: what a step has of each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from penstock.core.images import ImageJob
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Caps, Job, Request, RequestId, Sampling
from penstock.policy import batch, find
from tests.laws.model_ledger import ModelLedger
from tests.laws.views import Columns, HalfLengths, LinearCost

LEDGER = ModelLedger(4000, 16)


def made(seq: int, num_prompt: int, **facts: Any) -> Job:
    images = facts.pop("images", None)
    request = Request(
        id=RequestId(f"r{seq}"), model="m", prompt=TracedPrompt(num_prompt),
        sampling=Sampling(max_tokens=50),
    )  # fmt: skip
    told = dict(
        seq=seq, request=request, answer=0, arrived_at=0.0, hashes=[], num_prompt=num_prompt,
        max_tokens=50, **facts,
    )  # fmt: skip
    return Job(**told) if images is None else ImageJob(images=images, **told)


def decided(running: Sequence[Job], waiting: Sequence[Job], **parameters: Any) -> batch.Decision:
    ledger = ModelLedger(4000, 16)
    for job in running:
        assert ledger.reserve(job, job.computed)
    view = batch.View(
        now=1.0, rng=random.Random(0), running=running, waiting=waiting,
        caps=Caps(num_layers=2, max_context=10_000), ledger=ledger, cost=LinearCost(),
        lengths=HalfLengths(), admit=lambda job, tokens, fork: "yes",
        victims=lambda job, need, among, fork: (), columns=lambda: Columns(running),
    )  # fmt: skip
    decision: batch.Decision = find("batch", "epd")(**parameters).decide(view)
    batch.law(view, decision)
    return decision


def tokens_of(decision: batch.Decision) -> dict[int, int]:
    return {chunk.job.seq: chunk.tokens for lane in decision.batch.lanes for chunk in lane.chunks}


def images_of(decision: batch.Decision) -> dict[int, int]:
    return {job.seq: number for job, number in decision.encodes}


def writing(seq: int) -> Job:
    return made(seq, 100, num_output=3, computed=102, status="running", first_token_at=0.5)


def test_prompts_go_before_images_and_answers_before_both() -> None:
    answers = [writing(0), writing(1)]
    ready = made(2, 300, images=(200,), encoded=1)
    shown = [made(3, 300, images=(200, 50)), made(4, 300, images=(200,))]
    decision = decided(answers, [shown[0], ready, shown[1]], max_tokens=302, max_images=4)
    assert tokens_of(decision) == {0: 1, 1: 1, 2: 300}
    assert images_of(decision) == {}  # the prompt takes all that there is beside answers
    decision = decided(answers, [shown[0], ready, shown[1]], max_tokens=400, max_images=8)
    assert tokens_of(decision) == {0: 1, 1: 1, 2: 300}
    assert images_of(decision) == {3: 2}  # a quarter of the step is left
    decision = decided(answers, shown, max_tokens=302, max_images=2)
    assert tokens_of(decision) == {0: 1, 1: 1} and images_of(decision) == {3: 2}
    assert decision.stable_for == 1


def test_an_unencoded_prompt_never_starts_and_is_encoded_in_parts() -> None:
    job = made(0, 300, images=(100, 100, 50))
    decision = decided([], [job], max_images=2)
    assert tokens_of(decision) == {} and images_of(decision) == {0: 2}
    job.encoded = 2  # type: ignore[attr-defined]
    assert images_of(decided([], [job], max_images=2)) == {0: 1}
    job.encoded = 3  # type: ignore[attr-defined]
    assert tokens_of(decided([], [job], max_images=2)) == {0: 300}


def test_steps_that_hold_up_nobody_have_bounds_of_their_own() -> None:
    shown = [made(seq, 300, images=(200,)) for seq in range(1, 9)]
    wide = {"max_tokens": 128, "max_images": 1, "alone_tokens": 1000, "alone_images": 6}
    assert sum(images_of(decided([], shown, **wide)).values()) == 6
    assert sum(images_of(decided([writing(0)], shown, **wide)).values()) == 1
    text = [made(9, 900)]
    assert tokens_of(decided([], text, **wide)) == {9: 900}
    assert tokens_of(decided([writing(0)], text, **wide)) == {0: 1, 9: 127}


def test_without_images_it_is_vllm_v1() -> None:
    running, waiting = [writing(0)], [made(1, 700), made(2, 900)]
    ours = decided(running, waiting, max_tokens=1024)
    assert tokens_of(ours) == {0: 1, 1: 700, 2: 323} and not ours.encodes
