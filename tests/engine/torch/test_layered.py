"""Chunks that pass some layers at a time: what comes out, what is carried, and when it is dropped."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.core.plans import Yielded
from penstock.engine.torch.decoder import Decoder
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.layered import stretches_of
from penstock.engine.torch.open import EngineConfig, open_executor
from tests.engine.torch.driver import GREEDY, Driver, Held
from tests.engine.torch.models import saved
from tests.engine.torch.test_mixtures import distinct, routes_of

ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=64)
NUM_LAYERS = 8
PROMPT = [3 + (11 * at) % 500 for at in range(120)]
OTHERS = ([7, 8, 9], list(range(20, 57)))
ROUND = 48  # tokens
MOST_GROUPS = 4
TOLERANCE = 1e-5


def groups_of(count: int) -> list[tuple[int, int]]:
    return list(pairwise(round(NUM_LAYERS * at / count) for at in range(count + 1)))


@pytest.fixture
async def executor(
    model_root: Path, request: pytest.FixtureRequest
) -> AsyncIterator[TorchExecutor]:
    name, attention = request.param
    opened = open_executor(str(saved(model_root, name)[0]), replace(ENGINE, attention=attention))
    yield opened
    await opened.stop()


def opened(*kinds: tuple[str, str]) -> pytest.MarkDecorator:
    """Models, and their attention backends."""
    return pytest.mark.parametrize("executor", kinds, ids="-".join, indirect=True)


def recorded(executor: TorchExecutor) -> list[Tensor]:
    """All logits from now on, step by step."""
    found: list[Tensor] = []
    decoder, kind = executor._decoder, Decoder

    def logits(self: object, hidden: Tensor) -> Tensor:
        out = kind.logits(decoder, hidden)
        found.append(out.clone())
        return out

    decoder.__class__ = type("Recorded", (kind,), {"__slots__": (), "logits": logits})
    return found


Groups = list[tuple[int, int]] | None


async def prefill(driver: Driver, job: Held, beside: list[Held], groups: Groups) -> None:
    """Rounds of ROUND tokens; every plan runs one group of the round, and one token of each other job."""
    while not job.outputs:
        tokens = min(ROUND, job.known - job.computed)
        parts = [*[(other, 1) for other in beside], (job, tokens)]
        for layers in groups or [None]:
            done = await driver.step(parts, {} if layers is None else {job.seq: layers})
            assert done.error is None
            told = {out.seq for out in done.outputs if out.tokens}
            is_over = job.computed == len(PROMPT)
            assert told == {other.seq for other in beside} | ({job.seq} if is_over else set())


async def run(executor: TorchExecutor, groups: Groups) -> tuple[list[list[int]], list[Tensor]]:
    """A prompt of three rounds while others decode, then all decode; texts, and the logits of every step.

    The others decode for as many steps before as makes their number the same for all `groups`.
    """
    found = recorded(executor)
    driver = Driver(executor)
    others = [driver.job(ids, GREEDY) for ids in OTHERS]
    await driver.finish(others, 1)
    for _ in range(3 * MOST_GROUPS - 3 * len(groups or [None])):
        await driver.step([(other, 1) for other in others])
    job = driver.job(PROMPT, GREEDY)
    await prefill(driver, job, others, groups)
    await driver.finish([job, *others], 3 * MOST_GROUPS + 3)
    for one in (job, *others):
        driver.close(one)
    return [one.outputs for one in (job, *others)], found


@opened(("llama-8", "auto"), ("llama-8", "gather"), ("qwen3-moe-8", "auto"))
async def test_logits_are_those_of_whole_steps(executor: TorchExecutor) -> None:
    """Of the prompt and of those who decode beside it; and the text that follows."""
    want, whole = await run(executor, None)
    is_mixed = executor.expert_loads is not None
    for count in (2, MOST_GROUPS) if is_mixed else (1, 2, MOST_GROUPS):
        got, parts = await run(executor, groups_of(count))
        assert got == want
        first, last = (next(one[-1] for one in steps if len(one) == 3) for steps in (whole, parts))
        assert (first - last).abs().max() < TOLERANCE
        for mine, theirs in zip(whole, parts, strict=True):
            assert (mine[:2] - theirs[:2]).abs().max() < TOLERANCE


@opened(("llama-8", "auto"), ("qwen3-moe-8", "auto"))
async def test_the_text_is_the_references(model_root: Path, executor: TorchExecutor) -> None:
    _, model = saved(model_root, executor.facts.folder.name)
    driver = Driver(executor)
    beside = [driver.job(ids, GREEDY) for ids in OTHERS]
    await driver.finish(beside, 1)
    job = driver.job(PROMPT, GREEDY)
    await prefill(driver, job, beside, groups_of(4))
    await driver.finish([job, *beside], 15)
    for ids, one in zip((PROMPT, *OTHERS), (job, *beside), strict=True):
        want = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=15,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(ids) :]
        assert one.outputs[:15] == want.tolist()


@pytest.fixture
async def dense(model_root: Path) -> AsyncIterator[TorchExecutor]:
    opened = open_executor(str(saved(model_root, "llama-8")[0]), ENGINE)
    assert opened.caps.has_layer_ranges
    yield opened
    await opened.stop()


async def whole_text(driver: Driver) -> list[int]:
    job = driver.job(PROMPT, GREEDY)
    await driver.finish([job], 6, budget=len(PROMPT))
    return job.outputs


async def test_a_preempted_job_begins_anew(dense: TorchExecutor) -> None:
    """What it carried is gone, and asking for it ends that plan alone."""
    driver = Driver(dense)
    want = await whole_text(driver)
    job = driver.job(PROMPT, GREEDY)
    for layers in groups_of(4)[:2]:
        await driver.step([(job, ROUND)], {job.seq: layers})
    assert dense._table.jobs[job.seq].carried is not None
    driver.preempt(job)
    done = await driver.step([(job, ROUND)], {job.seq: (4, 6)})
    assert done.error is not None and "carries nothing into layer 4" in done.error
    assert dense._table.jobs[job.seq].carried is None
    job.is_fresh = True
    await prefill(driver, job, [], groups_of(2))
    await driver.finish([job], 6)
    assert job.outputs == want


async def test_carried_states_are_let_go(dense: TorchExecutor) -> None:
    """At the end of the job, and with the first plan after the last group; never more than two are held."""
    driver = Driver(dense)
    job, closed = driver.job(PROMPT, GREEDY), driver.job(PROMPT, GREEDY)
    held = []
    for at, layers in enumerate(groups_of(4)[:3]):
        await driver.step([(job, ROUND), (closed, 9)], {job.seq: layers, closed.seq: layers})
        assert dense.carried_bytes == min(at + 1, 2) * (ROUND + 9) * 64 * 4
        for one in (job, closed):
            carried = dense._table.jobs[one.seq].carried
            assert carried is not None and len(carried.at) <= 2
            held += [weakref.ref(states) for states in carried.at.values()]
    del carried, one
    driver.close(closed)
    await driver.step([(job, ROUND)], {job.seq: (6, 8)})
    await driver.step([(job, 5)])
    assert dense._table.jobs[job.seq].carried is None and dense.carried_bytes == 0
    assert len(held) == 10 and all(one() is None for one in held)


async def test_an_aborted_group_can_be_run_again(dense: TorchExecutor) -> None:
    """Left in the middle, or done before anybody heard of it."""
    driver = Driver(dense)
    want = await whole_text(driver)
    job = driver.job(PROMPT, GREEDY)
    await driver.step([(job, len(PROMPT))], {job.seq: (0, 3)})
    for layers, after in (((3, 5), {3, 5}), ((5, 8), {5})):
        for is_left in (True, False):
            plan = driver.plan([(job, len(PROMPT))], {job.seq: layers})
            dense.launch(plan)
            if is_left:
                dense.interrupt(plan.id, "operator")
                assert isinstance(await driver.told.get(), Yielded)
            while not is_left and set(dense._table.jobs[job.seq].carried.at) != after:  # type: ignore[union-attr]
                time.sleep(0.001)  # the loop hears of nothing meanwhile
            dense.abort(plan.id)
        done = await driver.step([(job, len(PROMPT))], {job.seq: layers})
        assert done.error is None
    await driver.finish([job], 6)
    assert job.outputs == want


async def test_a_group_can_be_suspended(dense: TorchExecutor) -> None:
    """At every boundary, decodes beside it, while others are served."""
    driver = Driver(dense)
    want = await whole_text(driver)
    job, beside, other = (driver.job(ids, GREEDY) for ids in (PROMPT, *OTHERS))
    await driver.finish([beside], 1)
    stops = 0
    for layers in groups_of(2):
        parts, through = [(beside, 1), (job, len(PROMPT))], {job.seq: layers}
        plan = driver.plan(parts, through)
        dense.launch(plan)
        dense.interrupt(plan.id, "operator")
        while isinstance(told := await asyncio.wait_for(driver.told.get(), 20), Yielded):
            stops += 1
            # all rows wait in one array beside what is in hand: 121 rows of 64 fp32 numbers
            assert told.activation_bytes >= 121 * 64 * 4
            await driver.step([(other, other.known - other.computed)])
            dense.resume(plan.id)
            dense.interrupt(plan.id, "operator")
        driver.apply(parts, told, through)
    assert stops == 2 * 2 * NUM_LAYERS
    await driver.finish([job], 6)
    assert job.outputs == want


async def test_scores_come_with_the_last_group(dense: TorchExecutor) -> None:
    driver = Driver(dense)
    whole, score = (driver.job(PROMPT, GREEDY, kind="score") for _ in range(2))
    await driver.step([(whole, len(PROMPT))])
    for tokens in (ROUND, len(PROMPT) - ROUND):
        for layers in groups_of(2):
            await driver.step([(score, tokens)], {score.seq: layers})
    want, got = (
        [out.prompt_logprobs for out in job.sampled if out.prompt_logprobs]
        for job in (whole, score)
    )
    assert len(want) == len(got) == 1
    for mine, theirs in zip(want[0][1:], got[0][1:], strict=True):
        assert mine is not None and theirs is not None
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


async def test_groups_load_each_expert_once(model_root: Path) -> None:
    """A prompt in groups reads per layer what the whole prompt's rows choose, once; in chunks, the sum over chunks."""
    folder, model = saved(model_root, "qwen3-moe-8")
    routes = routes_of(model, PROMPT)
    executor = open_executor(str(folder), ENGINE)
    driver, loads = Driver(executor), executor.expert_loads
    assert loads is not None
    chunked, layered = driver.job(PROMPT, GREEDY), driver.job(PROMPT, GREEDY)
    for _ in range(0, len(PROMPT), 30):
        await driver.step([(chunked, 30)])
    pieces = [distinct(routes, slice(first, first + 30)) for first in range(0, len(PROMPT), 30)]
    in_chunks = [sum(piece[layer] for piece in pieces) for layer in range(NUM_LAYERS)]
    assert loads.total == in_chunks
    for layers in groups_of(4):
        await driver.step([(layered, len(PROMPT))], {layered.seq: layers})
        assert set(loads.recent[-1][1]) == set(range(*layers))
    whole = list(distinct(routes).values())
    assert [now - was for now, was in zip(loads.total, in_chunks, strict=True)] == whole
    assert sum(whole) < sum(in_chunks) / 3
    await executor.stop()


async def test_decodes_beside_a_group_share_its_loads(model_root: Path) -> None:
    """In the group's layers the experts of both are read once; elsewhere those of the decode alone."""
    folder, model = saved(model_root, "qwen3-moe-8")
    ids = PROMPT[:40]
    alone, routes = routes_of(model, [*OTHERS[0]]), routes_of(model, ids)
    executor = open_executor(str(folder), ENGINE)
    driver, loads = Driver(executor), executor.expert_loads
    assert loads is not None
    decode, job = driver.job(OTHERS[0], GREEDY), driver.job(ids, GREEDY)
    await driver.step([(decode, 2)])
    await driver.step([(decode, 1), (job, 40)], {job.seq: (0, 3)})
    touched = loads.recent[-1][1]
    for layer in range(NUM_LAYERS):
        chosen = set(alone[layer][0][-1].tolist())
        if layer < 3:
            chosen |= set(routes[layer][0].flatten().tolist())
        assert touched[layer] == len(chosen)
    await executor.stop()


def test_stretches() -> None:
    def told(*ranges: tuple[int, int]) -> list[tuple[tuple[int, int], list[int]]]:
        return [(one.layers, one.chunks) for one in stretches_of(ranges)]

    assert told((0, 8), (2, 4)) == [((0, 2), [0]), ((2, 4), [0, 1]), ((4, 8), [0])]
    assert told((0, 8), (0, 4), (0, 8)) == [((0, 4), [0, 1, 2]), ((4, 8), [0, 2])]
    assert told((0, 2), (6, 8)) == [((0, 2), [0]), ((6, 8), [1])]
    assert told((3, 5), (3, 5)) == [((3, 5), [0, 1])]
