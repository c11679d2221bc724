"""Serving constants: a log and a client's readings of a server with known constants give these constants back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from penstock.assemble import Config, assemble, load_config, modelled_leaves
from penstock.core.arrivals import arrival_of
from penstock.core.clock import now
from penstock.core.errors import StepFailed
from penstock.core.events import Completed, Event, Stepped
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling
from penstock.cost.jitter import Jittered, kind_of, scatter_of
from penstock.cost.profile import Profile, SchedulerCost
from penstock.cost.serving import ServingCost
from penstock.cost.step import StepFeatures, features_of
from penstock.lab.client import Wish
from penstock.lab.foresee import Foreseen, foresee
from penstock.lab.serving import Answered, Ladder, _Asker
from penstock.lab.serving_cost import serving_cost
from penstock.lab.stream import Reading
from penstock.report.log import Memory
from penstock.sim.loop import run
from tests.cost.test_step_models import FITTED

SCHEDULER = SchedulerCost(fixed_s=1e-4, per_running_s=1e-5, per_waiting_s=0.0)
STEPS = {
    "step": 3e-3,
    "token": 5e-5,
    "decode_to_4": 2e-4,
    "decode_to_16": 3e-4,
    "decode_context": 4e-7,
}
TRUE = ServingCost(
    request_s=2e-3, request_token_s=3e-6, request_other_s=1e-4, reply_s=1e-3, reply_token_s=2e-4, steps=STEPS,
)  # fmt: skip


def config_of(tmp_path: Path, serving: ServingCost = TRUE) -> Config:
    path = tmp_path / "profile.json"
    Profile(
        model="default", num_layers=4, steps={}, num_steps=1, mape=0, left_out=0, scheduler=SCHEDULER, serving=serving,
    ).save(path)  # fmt: skip
    return load_config(
        flags={
            "fleet.0.executor.kind": "modelled",
            "fleet.0.executor.profile": str(path),
            "fleet.0.cache.num_blocks": 8192,
        }
    )


def request_of(number: int, num_prompt: int, num_output: int) -> Request:
    return Request(
        id=RequestId(f"r{number}"),
        model="default",
        prompt=TracedPrompt(num_prompt),
        sampling=Sampling(max_tokens=num_output),
        true_output=num_output,
    )


def true_step_s(tokens: int) -> float:
    return 3e-3 + 5e-5 * tokens


def arrived(number: int, tokens: int, at: float) -> Event:
    request = request_of(number, tokens, 1)
    return arrival_of(request, at=at, who="r", seq=number, hashes=())


def stepped(number: int, tokens: int, at: float) -> Event:
    return Stepped(
        at=at, who="r", plan=number, lane=0, digest="", repeat=1, chunks=((number, tokens),), admitted=(), evicted=(),
        num_running=1, num_waiting=0, free_blocks=1, why="",
    )  # fmt: skip


def completed(number: int, at: float) -> Event:
    return Completed(
        at=at, who="r", plan=number, steps_run=1, ends=(at,), outputs=((number, 1, True, ()),), errors=(), error=None,
    )  # fmt: skip


async def asked(config: Config, callers: int, log: Memory) -> list[Answered]:
    """Callers that ask one after the other, of a modelled server behind the TRUE ways."""
    draw = np.random.default_rng(callers)
    requests = {
        one.id: one
        for one in (
            request_of(i, int(draw.integers(10, 900)), int(draw.integers(2, 60)))
            for i in range(12 * callers)
        )
    }
    service = await assemble(config, modelled_leaves(config, log))
    asker, left, found = Foreseen(service, requests, TRUE), list(requests.values()), []
    num_open = 0

    async def caller() -> None:
        nonlocal num_open
        while left:
            request, reading, sent_at, others = left.pop(), Reading(), now(), num_open
            num_open += 1
            await asker.ask(Wish(prompt=request.id), reading)
            num_open -= 1
            assert reading.first_at is not None and reading.last_at is not None
            size = request.prompt.num_tokens
            found.append(
                Answered(request.id, size, others, sent_at, reading.first_at, reading.last_at)
            )

    await asyncio.gather(*(caller() for _ in range(callers)))
    await service.stop()
    return found


def singly(events: list[Event]) -> list[Event]:
    """A real engine launches steps one by one: its log has the ends of single steps only."""
    return [event for event in events if getattr(event, "who", "") != "fleet-default"]


@pytest.mark.parametrize("callers", [9])
def test_a_run_gives_back_the_constants_that_made_it(tmp_path: Path, callers: int) -> None:
    log = Memory()
    answers = run(asked(config_of(tmp_path), callers, log))
    found = serving_cost(answers, singly(log.events), SCHEDULER, measured="a test")
    for name in ("request_s", "request_token_s", "request_other_s", "reply_s", "reply_token_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6), name
    assert found.left_out < 0.02 and found.num_answers == 12 * callers
    for kind, ratios in found.scatter.items():
        assert np.mean(ratios or [1.0]) == pytest.approx(1.0, abs=0.02), kind


def test_what_an_idle_engine_takes_longer_is_found() -> None:
    """Steps after a pause take 7 ms more than those that follow at once; the fit is of the latter alone."""

    def events() -> Iterator[Event]:
        at = 0.0
        for plan in range(200):
            at += 0.2 if plan % 5 == 0 else 0.0
            steps_s = (
                true_step_s(plan % 40 + 2)
                + SCHEDULER.seconds(1, 0)
                + (7e-3 if plan % 5 == 0 else 0.0)
            )
            yield arrived(plan, plan % 40 + 2, at)
            yield stepped(plan, plan % 40 + 2, at)
            at += steps_s
            yield completed(plan, at)

    answers = [Answered(f"r{i}", i % 40 + 2, 0, 0.0, 1e9, 1e9) for i in range(200)]
    found = serving_cost(answers, list(events()), SCHEDULER)
    assert found.cold_s == pytest.approx(7e-3, rel=1e-3)
    assert found.request_seconds(10, 0) - found.request_seconds(10, 1) == pytest.approx(
        found.cold_s - found.request_other_s
    )


def test_too_few_answers_are_refused(tmp_path: Path) -> None:
    log = Memory()
    answers = run(asked(config_of(tmp_path), 2, log))
    with pytest.raises(StepFailed, match="only 24 answers"):
        serving_cost(answers, singly(log.events), SCHEDULER)


def test_a_lone_request_takes_the_sum_of_its_parts(tmp_path: Path) -> None:
    """Way in, prefill, decodes, way out; each with what it was said to take."""
    driven = foresee(config_of(tmp_path), [(0.0, request_of(0, 100, 3))], TRUE)
    (group,) = driven.groups.values()
    step_s = SCHEDULER.seconds(1, 0) + STEPS["step"]
    ttft_s = TRUE.request_seconds(100, 0) + step_s + 100 * STEPS["token"] + TRUE.reply_seconds(1)
    decode_s = step_s + STEPS["token"] + STEPS["decode_to_4"]
    contexts = 101 + 102
    assert group.ttft_s[0] == pytest.approx(ttft_s, rel=1e-9)
    rest_s = 2 * decode_s + contexts * STEPS["decode_context"]
    assert group.e2e_s[0] == pytest.approx(ttft_s + rest_s, rel=1e-9)
    assert group.tpot_s[0] == pytest.approx(rest_s / 2, rel=1e-9)


def test_scatter_keeps_the_mean_and_is_seeded(tmp_path: Path) -> None:
    drawn = np.random.default_rng(1).lognormal(0, 0.5, 5000)
    scattered = ServingCost(
        request_s=0, request_token_s=0, request_other_s=0, reply_s=0, reply_token_s=0, steps=STEPS,
        scatter={"decode": scatter_of(drawn, [drawn.mean()] * len(drawn))},
    )  # fmt: skip
    plain = ServingCost(
        request_s=0, request_token_s=0, request_other_s=0, reply_s=0, reply_token_s=0, steps=STEPS,
    )  # fmt: skip
    requests = [(0.0, request_of(0, 10, 2000))]

    def e2e_s(serving: ServingCost, seed: int) -> float:
        driven = foresee(config_of(tmp_path, serving), requests, serving, seed=seed)
        (group,) = driven.groups.values()
        return group.e2e_s[0]

    found = [e2e_s(scattered, seed) for seed in (0, 0, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert np.mean(found[1:]) == pytest.approx(e2e_s(plain, 0), rel=0.03)


def test_kinds_of_steps_scatter_by_themselves() -> None:
    decode, short, long = (
        features_of([(10, 1, True)]), features_of([(0, 100, True)]), features_of([(0, 900, True), (5, 1, True)]),
    )  # fmt: skip
    assert [kind_of(one) for one in (decode, short, long)] == ["decode", "short", "long"]
    model = Jittered(FITTED, scatter={"short": (2.0,)}, chance=lambda: 0.5)
    assert model.seconds(short) == 2 * FITTED.seconds(short)
    assert model.seconds(long) == FITTED.seconds(long)
    assert model.run_seconds(decode, 3) == FITTED.run_seconds(decode, 3)
    assert model.step(short) == FITTED.step(short)
    assert scatter_of([1.0] * 10, [1.0] * 10) == ()
    uneven = scatter_of([2.0] * 40 + [9.0] * 10, [1.0] * 40 + [10.0] * 10)
    assert np.mean(uneven) == pytest.approx(170 / 140) and max(uneven) > min(uneven)
    assert isinstance(decode, StepFeatures)


def test_the_ladder_draws_lengths_that_fit_the_context() -> None:
    class Spoken:
        def compose(self, request: Request) -> str:
            return str(request.prompt.num_tokens)

    wishes = _Asker(None, Spoken(), 3).wishes(2048)  # type: ignore[arg-type]
    drawn = [next(wishes) for _ in range(500)]
    prompts = [int(str(one.prompt)) for one in drawn]
    assert all(int(str(one.prompt)) + (one.max_tokens or 0) <= 2048 for one in drawn)
    assert min(prompts) < 30 and max(prompts) > 1200
    assert str(Ladder(callers=(1, 2), seconds=3)).endswith("1, 2 callers for 3 s each")
