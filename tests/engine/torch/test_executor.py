"""The executor port, by hand: interrupts, aborts, failures, stops, hashes and log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock.core.plans import Done, Yielded
from penstock.core.prompt import TokenPrompt, TracedPrompt
from penstock.core.types import Sampling
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.open import EngineConfig, open_executor
from tests.engine.torch.driver import GREEDY, Driver
from tests.engine.torch.models import saved

ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=64)
PROMPT = list(range(10, 50))


@pytest.fixture
async def executor(model_root: Path) -> AsyncIterator[TorchExecutor]:
    folder, _ = saved(model_root, "qwen3")
    opened = open_executor(str(folder), ENGINE)
    yield opened
    await opened.stop()


async def test_caps_and_memory(executor: TorchExecutor) -> None:
    assert executor.caps.num_layers == 3
    assert executor.caps.max_context == 512
    # keys and values, 3 layers, 64 blocks of 16, 2 heads of 32 floats
    assert executor.kv_bytes == 2 * 3 * 64 * 16 * 2 * 32 * 4


@pytest.mark.parametrize("grain", ["operator", "layer"])
async def test_interrupted_steps_change_nothing(executor: TorchExecutor, grain: str) -> None:
    """A prefill is left at every boundary, another job is served meanwhile, and both get what they would."""
    driver = Driver(executor)
    whole = driver.job(PROMPT, GREEDY)
    await driver.finish([whole], 4)
    first, second = driver.job(PROMPT, GREEDY), driver.job([3, 4, 5], GREEDY)
    plan = driver.plan([(first, len(PROMPT))])
    executor.launch(plan)
    executor.interrupt(plan.id, grain)  # type: ignore[arg-type]
    stops = 0
    while isinstance(told := await asyncio.wait_for(driver.told.get(), 20), Yielded):
        stops += 1
        assert told.activation_bytes > 0
        await driver.step([(second, second.known - second.computed)])
        executor.resume(plan.id)
        executor.interrupt(plan.id, grain)  # type: ignore[arg-type]
    assert stops == (6 if grain == "operator" else 3)
    driver.apply([(first, len(PROMPT))], told)
    await driver.finish([first], 4)
    assert first.outputs == whole.outputs
    assert len(second.outputs) == stops


async def test_abort_at_any_moment(executor: TorchExecutor) -> None:
    """Waiting, running, left or already done: nothing is heard, and the job goes on as if it had not run."""
    driver = Driver(executor)
    want = driver.job(PROMPT, GREEDY)
    await driver.finish([want], 6)
    job = driver.job(PROMPT, GREEDY)
    await driver.finish([job], 2)
    for moment in ("at once", "later", "left"):
        plan = driver.plan([(job, 1)])
        executor.launch(plan)
        if moment == "left":
            executor.interrupt(plan.id, "operator")
            assert isinstance(await driver.told.get(), Yielded)
        if moment == "later":  # the lane is done, its word has not been heard yet
            executor._lanes[0]._inbox.put(None)
            executor._lanes[0]._thread.join(10)
        executor.abort(plan.id)
        await asyncio.sleep(0.05)
        assert driver.told.empty()
        if moment == "later":
            executor._lanes[0].__init__(  # type: ignore[misc]
                run=executor._step, close=executor._close, tell=executor._tell, threads=1
            )
    await driver.finish([job], 6)
    assert job.outputs == want.outputs


async def test_filled_blocks(executor: TorchExecutor) -> None:
    """Hashes of blocks that outputs completed, each told once, also across a preemption."""
    driver = Driver(executor)
    job = driver.job(PROMPT[:10], GREEDY)
    await driver.finish([job], 30)
    driver.preempt(job)
    await driver.finish([job], 60, budget=7)
    told = [known for out in job.sampled for known in out.filled]
    whole = TokenPrompt((*PROMPT[:10], *job.outputs[: job.computed - 10])).blocks(16)
    assert told == list(whole)


async def test_stops(executor: TorchExecutor) -> None:
    """Stop ids stop, unless the answer is still too short; eos stops unless ignored."""
    driver = Driver(executor)
    plain = driver.job(PROMPT, GREEDY)
    await driver.finish([plain], 8)
    third = plain.outputs[2]
    stopping = driver.job(PROMPT, replace(GREEDY, stop_ids=(third,)))
    await driver.finish([stopping], 3)
    assert [out.is_stop for out in stopping.sampled] == [False, False, True]
    patient = driver.job(PROMPT, replace(GREEDY, stop_ids=(third,), min_tokens=5))
    await driver.finish([patient], 5)
    assert third not in patient.outputs
    bias = ((2, 100.0),)
    ending = driver.job(PROMPT, Sampling(temperature=0.0, logit_bias=bias))
    ignoring = driver.job(PROMPT, replace(GREEDY, logit_bias=bias))
    await driver.finish([ending, ignoring], 1, budget=100)
    assert ending.outputs == ignoring.outputs == [2]
    assert ending.sampled[0].is_stop and not ignoring.sampled[0].is_stop


async def test_bad_jobs_harm_nobody(executor: TorchExecutor) -> None:
    driver = Driver(executor)
    good = driver.job(PROMPT, GREEDY)
    outside = driver.job([5, 512], GREEDY)
    adapter = driver.job(PROMPT, GREEDY, adapter="style")
    biased = driver.job(PROMPT, replace(GREEDY, logit_bias=((9000, 1.0),)))
    traced = driver.job(PROMPT, GREEDY)
    traced.request = replace(traced.request, prompt=TracedPrompt(8))
    parts = [(job, min(8, job.known)) for job in (outside, adapter, biased, traced)]
    done = await driver.step([(good, len(PROMPT)), *parts])
    errors = {out.seq: out.error for out in done.outputs if out.error}
    assert set(errors) == {job.seq for job, _ in parts}
    assert len(good.outputs) == 1


async def test_a_failing_step_ends_alone(
    executor: TorchExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(executor)
    job, other = driver.job(PROMPT, GREEDY), driver.job(PROMPT, GREEDY)
    layer = executor._decoder.layers[1]
    whole = layer.mlp

    def fail(x: torch.Tensor, taken: object) -> torch.Tensor:
        raise MemoryError

    layer.mlp = fail
    done = await driver.step([(job, len(PROMPT))])
    assert done.error is not None and "out of memory" in done.error
    layer.mlp = whole
    await driver.finish([other], 3)
    assert len(other.outputs) == 3


async def test_prompt_logprobs(executor: TorchExecutor, model_root: Path) -> None:
    """Equal to transformers' log-softmax, in any chunks, for scoring and for generating jobs."""
    _, model = saved(model_root, "qwen3")
    with torch.inference_mode():
        want = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    driver = Driver(executor)
    score = driver.job(PROMPT, GREEDY, kind="score")
    generate = driver.job(PROMPT, replace(GREEDY, prompt_logprobs=2, logprobs=1))
    for size in (16, 16, 8):
        await driver.step([(score, size), (generate, size)])
    for job in (score, generate):
        told = [out for out in job.sampled if out.prompt_logprobs]
        assert len(told) == 1 and len(told[0].prompt_logprobs) == len(PROMPT)
        first, *rest = told[0].prompt_logprobs
        assert first is None
        for at, entry in enumerate(rest):
            assert entry is not None and entry.id == PROMPT[at + 1]
            assert entry.logprob == pytest.approx(float(want[at, entry.id]), abs=1e-4)
            assert len(entry.top) == (2 if job is generate else 0)
    assert len(generate.outputs) == 1 and not score.outputs
    (entry,) = generate.sampled[-1].logprobs
    assert entry.logprob == pytest.approx(float(want[-1].max()), abs=1e-4)
    await driver.finish([generate], 20)
    assert not any(out.filled for out in generate.sampled)  # nobody is to find its blocks


@pytest.mark.parametrize("prompt", [[7, 8], [7], [7, 8, 9]])
async def test_scoring_the_prompt_changes_no_token(
    executor: TorchExecutor, prompt: list[int]
) -> None:
    """All rows of the step are wanted, but not in their order: the sampled one comes first."""
    driver = Driver(executor)
    plain = driver.job(prompt, GREEDY)
    scored = driver.job(prompt, replace(GREEDY, prompt_logprobs=0))
    await driver.finish([plain], 6)
    await driver.finish([scored], 6)
    assert scored.outputs == plain.outputs


async def test_seeded_sampling_survives_batching_and_preemption(executor: TorchExecutor) -> None:
    driver = Driver(executor)
    warm = Sampling(temperature=1.0, top_p=0.9, seed=5, ignore_eos=True)
    alone = driver.job(PROMPT, warm)
    await driver.finish([alone], 20)
    crowd = [driver.job(PROMPT[: 5 + n], Sampling(ignore_eos=True)) for n in range(6)]
    again = driver.job(PROMPT, warm)
    second = driver.job(PROMPT, warm, answer=1)
    await driver.finish([again, second, *crowd], 9)
    driver.preempt(again)
    await driver.finish([again, second, *crowd], 20, budget=33)
    assert again.outputs == alone.outputs
    assert second.outputs != alone.outputs


async def test_rows_are_reused(executor: TorchExecutor) -> None:
    """Many jobs come and go; the table does not grow with them and nothing leaks from one to the next."""
    driver = Driver(executor)
    want: list[int] = []
    for _ in range(12):
        jobs = [driver.job(PROMPT[: 3 + n], GREEDY) for n in range(10)]
        await driver.finish(jobs, 4, budget=200)
        assert not want or jobs[0].outputs == want
        want = jobs[0].outputs
        for job in jobs:
            driver.close(job)
    assert len(executor._table.tokens) == 16


async def test_stop_in_the_middle(model_root: Path) -> None:
    folder, _ = saved(model_root, "qwen3")
    executor = open_executor(str(folder), ENGINE)
    driver = Driver(executor)
    job = driver.job(PROMPT, GREEDY)
    executor.launch(driver.plan([(job, len(PROMPT))]))
    await asyncio.wait_for(executor.stop(), 10)
    await executor.stop()
    assert not executor._lanes[0]._thread.is_alive()
    assert driver.told.empty() or isinstance(driver.told.get_nowait(), Done)
