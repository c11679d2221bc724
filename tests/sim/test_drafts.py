"""Guesses in simulations: as often right as was said, whoever asks; answers of the right length; charged for."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import pytest

from penstock.assemble import load_config
from penstock.core.config import Table
from penstock.core.drafts import Speculation
from penstock.core.errors import BadConfig
from penstock.core.events import Completed, Drafted, Finished, Stepped
from penstock.core.plans import Done, Opening, Plan, Sampled, Work
from penstock.core.prompt import TracedPrompt
from penstock.core.types import HostLink, PlanId, Request, RequestId
from penstock.core.views import Batch, Chunk, Lane
from penstock.engine.replica import Replica
from penstock.engine.swap import SwapConfig
from penstock.policy import batch
from penstock.policy.batch.vllm_v1 import VllmV1
from penstock.report.log import Memory
from penstock.sim.drafts import Drafting, DraftingExecutor, Luck
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run
from tests.lab.test_replay import CAPS, made, parts, replay_replica, write
from tests.sim.test_modelled_executor import Plain, opening, request


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("most", [1, 3, 6])
def test_tokens_a_step_are_those_of_the_geometric_series(rate: float, most: int) -> None:
    """1 + p + ... + p^k of them where every guess is right with chance p, as is known of speculative decoding."""
    luck, position, steps = Luck(Speculation(acceptance=(rate,)), request(0 + 1, None), 0, 3), 1, 0
    while steps < 6000:
        drafted, right = luck.guess(position, most)
        assert drafted == most and right <= most
        position, steps = position + 1 + right, steps + 1
    expected = sum(rate**depth for depth in range(most + 1))
    assert (position - 1) / steps == pytest.approx(expected, rel=0.03)


def test_luck_is_of_the_position_and_not_of_the_plan() -> None:
    told = Speculation(acceptance=(0.5,), proposes=0.7)
    first, second = (Luck(told, request(4, None), 0, 1) for _ in range(2))
    said = [first.guess(at, 3) for at in range(4, 60)]
    backwards = [second.guess(at, 3) for at in range(59, 3, -1)][::-1]
    assert said == backwards
    assert 0.5 < sum(drafted > 0 for drafted, _ in said) / len(said) < 0.9
    assert [Luck(told, request(4, None), 1, 1).guess(at, 3) for at in range(4, 60)] != said


def test_depths_and_tenants_have_their_own_chances() -> None:
    told = Speculation(acceptance=(1.0, 0.0), of_tenants={"code": (1.0,)})
    asked = Request(id=RequestId("r"), model="m", prompt=TracedPrompt(3))
    coded = Request(id=RequestId("r"), model="m", prompt=TracedPrompt(3), tenant="code")
    assert Luck(told, asked, 0, 0).guess(3, 4) == (4, 1)
    assert Luck(told, coded, 0, 0).guess(3, 4) == (4, 4)


def played(speculation: Speculation, *works: Work, drafter: Any = None) -> list[Done]:
    heard: list[Any] = []

    async def go() -> None:
        executor = DraftingExecutor(Plain(), Drafting(speculation, drafter), caps=CAPS)
        executor.listen(heard.append)
        openings = [opening(work.seq, 4, 9) for work in works]
        for number, work in enumerate(works):
            executor.launch(Plan(PlanId(number), (work,), opened=(openings[number],)))
            while len(heard) <= number:
                await asyncio.sleep(1)

    run(go())
    return heard


def test_an_answer_ends_at_its_length_wherever_in_the_guesses() -> None:
    always = Speculation(acceptance=(1.0,))
    done = played(
        always,
        Work(1, 4, 4, True, phase="verify"),
        Work(2, 9, 4, True, phase="verify"),
        Work(3, 12, 4, True, phase="verify"),
    )
    assert [one.outputs[0] for one in done] == [
        Sampled(1, 4, drafted=3),
        Sampled(2, 3, is_stop=True, drafted=3),
        Sampled(3, 1, is_stop=True, drafted=3),
    ]


def test_a_step_is_charged_for_guesses_and_for_who_makes_them() -> None:
    work = Work(1, 4, 4, True, phase="verify")
    never = Speculation(acceptance=(1.0,), proposes=0.0)
    plain, alone, both = (
        played(told, work, drafter=drafter)[0].ends[0]
        for told, drafter in (
            (never, Plain()),
            (Speculation(), None),
            (Speculation(), Plain()),
        )
    )
    assert plain == pytest.approx(1.005)  # one decode that reads five positions
    assert alone == pytest.approx(1.0)  # a chunk of four, which this model prices like any step
    assert both == pytest.approx(alone + 1.005 + 1.006 + 1.007)


def test_who_does_not_guess_gives_one_token() -> None:
    async def go() -> list[Done]:
        heard: list[Any] = []
        executor = ModelledExecutor(Plain(), caps=CAPS)
        executor.listen(heard.append)
        work = (Work(1, 9, 4, True, phase="verify"),)
        executor.launch(Plan(PlanId(0), work, opened=(Opening(1, request(4, 9), 0),)))
        await asyncio.sleep(5)
        return heard

    assert run(go())[0].outputs == (Sampled(1, 1),)


SPECULATIVE: dict[str, object] = {
    "name": "speculative",
    "inner": Table(name="vllm-v1", max_tokens=64),
}


def guessed_log(rate: float, num_blocks: int = 60) -> list[Any]:
    record, memory = made(num_blocks, batch=SPECULATIVE), Memory()
    executor = DraftingExecutor(
        parts(record).predictors.cost.model, Drafting(Speculation(acceptance=(rate,))), caps=CAPS
    )
    run(write(record, memory, 1, executor, num=60, gap_s=0.02))
    return memory.events


def test_runs_replay_identically() -> None:
    log = guessed_log(0.7, 30)
    judge = replay_replica(log, parts(made(30, batch=SPECULATIVE)))
    steps = [event for event in log if isinstance(event, Stepped)]
    assert judge.num_decisions == len(steps) > 50
    assert sum(isinstance(event, Drafted) for event in log) > 50
    assert any(event.evicted for event in steps)


def test_tokens_add_up_and_right_guesses_save_steps() -> None:
    numbers = {}
    for rate in (0.0, 0.9):
        log = guessed_log(rate)
        done = [event for event in log if isinstance(event, Completed)]
        ended = [event for event in log if isinstance(event, Finished)]
        gave = sum(tokens for event in done for _, tokens, _, _ in event.outputs)
        assert gave == sum(event.num_output for event in ended)
        numbers[rate] = sum(event.steps_run for event in done)
    assert numbers[0.9] < 0.75 * numbers[0.0]


def test_configurations_say_what_cannot_be() -> None:
    modelled = ["fleet.0.executor.kind=modelled", "fleet.0.executor.gpu=a100-80g"]

    def loaded(*sets: str) -> Any:
        return load_config(None, sets=[*modelled, *sets])

    fleet = loaded('fleet.0.speculation.method="ngram"').fleet[0]
    assert fleet.speculation == Speculation()
    for sets, wrong in (
        (['fleet.0.policy.batch="speculative"'], "nobody makes any"),
        (["fleet.0.speculation.max_drafts=0"], "max_drafts"),
        (["fleet.0.speculation.method=draft"], "needs a `model`"),
        (["fleet.0.speculation.acceptance=[2.0]"], "probabilities"),
        (["fleet.0.speculation.min_ngram=9"], "min_ngram"),
        (["fleet.0.speculation.max_drafts=2", "fleet.0.policy.preset=semi-pd"], "one lane"),
        (["fleet.0.speculation.max_drafts=2", "fleet.0.executor.lanes=2"], "one lane"),
        (["fleet.0.speculation.max_drafts=2", "fleet.0.policy.preset=dllm-serve"], "left to right"),
    ):
        with pytest.raises(BadConfig, match=wrong):
            loaded(*sets)


def test_a_replica_that_does_not_guess_says_nothing_of_it() -> None:
    """So the logs of everybody else are, byte for byte, what they were."""
    assert "speculation" not in json.dumps(made(9).spec)


class EveryOther:
    """Plans 5 guesses in every second step."""

    calls = 0

    def decide(self, view: batch.View) -> batch.Decision:
        said = VllmV1().decide(view)
        self.calls += 1
        jobs = [
            job for job in view.running if job.num_output and job.max_tokens - job.num_output > 6
        ]
        if jobs and self.calls % 2:
            chunks = tuple([Chunk(job, 6, None, "verify") for job in jobs])
            return batch.Decision(Batch((Lane(chunks),)))
        said.stable_for, said.outlasts = 1, False
        return said


@pytest.mark.parametrize("store", ["hash", "radix"])
@pytest.mark.parametrize("swap", [SwapConfig(), SwapConfig(host_blocks=8)])
def test_blocks_of_wrong_guesses_are_given_back(store: Any, swap: SwapConfig) -> None:
    """After each step a job holds the blocks of what it computed, and in the next one those of its plan."""
    memory, size = Memory(), 4
    of = parts(made(60))
    link = HostLink(dispatch_s=1e-3, bytes_per_s=1e9, block_bytes=500, pieces=2)
    caps = dataclasses.replace(CAPS, host_blocks=8, link=link) if swap.host_blocks else CAPS
    executor = DraftingExecutor(Plain(), Drafting(Speculation(acceptance=(0.4,))), caps=caps)
    policies = dataclasses.replace(of.policies, batch=EveryOther())
    config = dataclasses.replace(
        of.config, block_size=size, is_checked=True, store=store, swap=swap, num_blocks=60
    )
    replica = Replica(config, executor, policies, of.predictors, log=memory)

    async def go() -> None:
        running = asyncio.get_running_loop().create_task(replica.run())
        replica.submit(request(9, 60))
        await replica.drain()
        await replica.stop()
        await running

    run(go())
    computed, num_verified = 0, 0
    for event in memory.events:
        if isinstance(event, Stepped) and event.chunks:
            ((_, tokens),) = event.chunks
            held = 60 - event.free_blocks
            assert held == -(-(computed + tokens) // size), (
                f"{held} blocks for {computed} + {tokens}"
            )
            num_verified += tokens == 6
        elif isinstance(event, Completed):
            ((_, tokens, _, _),) = event.outputs
            computed = 9 if not computed else computed + tokens
    assert num_verified > 10
