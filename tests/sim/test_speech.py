"""The executor that says tokens: the right ones by what its memory holds, and an error where that holds nothing."""

from __future__ import annotations

import asyncio

import pytest

from penstock.core.plans import Done, Opening, Plan, Transfer, Work
from penstock.core.ports import Completion
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Caps, HostLink, PlanId, Request, RequestId
from penstock.cost.hardware import card_of
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import shape_of
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run
from penstock.sim.speech import Speaker, said

PROMPT = (5, 7, 11, 13, 17, 19)


def speaker() -> tuple[Speaker, list[Completion]]:
    link = HostLink(dispatch_s=0.0, bytes_per_s=1e9, block_bytes=1000, pieces=1)
    caps = Caps(num_layers=32, max_context=64, host_blocks=4, link=link)
    inner = ModelledExecutor(Roofline(shape_of("llama-2-7b"), card_of("a100-80g"), tp=1), caps=caps)
    made = Speaker(inner, num_blocks=8, block_size=4, host_blocks=4)
    heard: list[Completion] = []
    made.listen(heard.append)
    return made, heard


def opening(seq: int = 0) -> Opening:
    request = Request(id=RequestId(f"q{seq}"), model="m", prompt=TokenPrompt(PROMPT), true_output=9)
    return Opening(seq, request, 0)


def plan(number: int, *work: Work, opened: tuple[Opening, ...] = ()) -> Plan:
    return Plan(PlanId(number), work, opened)


async def ran(made: Speaker, heard: list[Completion], *plans: Plan) -> list[tuple[int, ...]]:
    """The tokens of each plan's first job."""
    told = []
    for each in plans:
        made.launch(each)
        await asyncio.sleep(1.0)
        done = heard.pop()
        assert isinstance(done, Done)
        told.append(done.outputs[0].ids if done.outputs else ())
    return told


def test_what_is_said_goes_on_like_the_prompt_with_it_and_depends_on_every_token() -> None:
    right = said(PROMPT, 6)
    assert said((*PROMPT, *right[:2]), 4) == right[2:]
    for place in range(len(PROMPT)):
        other = (*PROMPT[:place], PROMPT[place] + 1, *PROMPT[place + 1 :])
        assert said(other, 6) != right


def test_chunks_shared_blocks_and_copies_leave_the_tokens_as_they_are() -> None:
    async def body() -> None:
        made, heard = speaker()
        right = said(PROMPT, 4)
        first = plan(0, Work(0, 0, 4, False, (0,), True), opened=(opening(),))
        told = await ran(made, heard, first, plan(1, Work(0, 4, 2, True, (1,))))
        shared = plan(2, Work(1, 4, 2, True, (0, 2), True), opened=(opening(1),))
        told += await ran(made, heard, shared, plan(3, Work(0, 6, 1, True)))
        assert told == [(), right[:1], right[:1], right[1:2]]
        made.transfer(Transfer(0, 0, True, ((0, 2, 2),)))
        made.transfer(Transfer(1, 0, False, ((6, 2, 2),)))
        await asyncio.sleep(1.0)
        heard.clear()
        moved = plan(4, Work(0, 7, 1, True, (6, 7), True))
        assert await ran(made, heard, moved) == [right[2:3]]
        await made.stop()

    run(body())


def test_a_block_with_something_else_in_it_changes_what_is_said_and_an_empty_one_is_an_error() -> (
    None
):
    async def body(other: int) -> list[tuple[int, ...]]:
        made, heard = speaker()
        await ran(made, heard, plan(0, Work(0, 0, 6, True, (0, 1), True), opened=(opening(),)))
        wrong = plan(1, Work(0, 6, 1, True, (other, 1), True))
        return await ran(made, heard, wrong)

    assert run(body(0)) == [said(PROMPT, 2)[1:]]
    with pytest.raises(AssertionError, match="read and never written"):
        run(body(5))
    with pytest.raises(AssertionError, match="read and never written"):
        run(body(1))


def test_a_step_that_fails_writes_nothing_and_one_that_stands_still_is_told_later() -> None:
    async def body() -> None:
        made, heard = speaker()
        made.stand_still(5.0)
        made.launch(plan(0, Work(0, 0, 6, True, (0, 1), True), opened=(opening(),)))
        await asyncio.sleep(4.9)
        assert not heard
        made.fail_next("out of memory")
        await asyncio.sleep(0.2)
        (done,) = heard
        assert isinstance(done, Done) and done.error == "out of memory"
        assert made.slots[0] == [None] * 4
        await made.stop()

    run(body())
