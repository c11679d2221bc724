"""Queues of two phases against closed forms, against themselves step by step, and against the simulator."""

from __future__ import annotations

import math
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cost.linear_five import linear_five
from penstock.lab import phases
from penstock.lab.phases import Instance, Job, serve, serve_decodes, steps_until
from penstock.traffic.arrivals import Poisson

MODEL = linear_five("distserve", "opt-13b", 1, num_layers=40)


def instance(work: str, **more: object) -> Instance:
    settings = {"model": MODEL, "work": work, "kv_tokens": 50_000, **more}
    return Instance(**settings)  # type: ignore[arg-type]


def prompt_s(tokens: int) -> float:
    ms = 18.10254647486372 + 0.1019122572698738 * tokens + 7.122264314252114e-06 * tokens**2
    return 1e-3 * (ms + 2 + 1e-4 * tokens) + phases.HOP_S


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_prompts_of_one_length_one_at_a_time_wait_as_in_m_d_1(load: float) -> None:
    """Mean wait of M/D/1: load / (2 (1 - load)) services (Pollaczek and Khinchine)."""
    service = prompt_s(512)
    instants = islice(Poisson(rate_per_s=load / service).instants(7), 20_000)
    jobs = [Job(at, 512, 0) for at in instants]
    serve(jobs, instance("prefill", kv_tokens=512))
    waited = sum(job.ttft_s - service for job in jobs) / len(jobs)
    assert waited == pytest.approx(load / (2 * (1 - load)) * service, rel=0.06)


def test_decodes_that_begin_together_take_the_sum_of_their_steps() -> None:
    jobs = [Job(0.0, 300, 50) for _ in range(10)]
    for job in jobs:
        job.first_at = 0.0
    serve_decodes(jobs, instance("decode"))
    steps = (
        19.934702624895458 + 0.03850697740828398 * 10 + 2
        + (0.0006269356524350583 + 1e-4) * 10 * (301 + step)
        for step in range(50)
    )  # fmt: skip
    want = 1e-3 * sum(steps)
    assert [job.last_at for job in jobs] == [pytest.approx(want)] * 10


def test_prompts_that_wait_go_together_when_memory_holds_them() -> None:
    jobs = [Job(0.0, 400, 0), Job(0.001, 400, 0), Job(0.002, 400, 0)]
    serve(jobs, instance("prefill"))
    assert jobs[1].first_at == jobs[2].first_at > jobs[0].first_at
    serve(jobs, instance("prefill", kv_tokens=400))
    assert jobs[2].first_at == pytest.approx(3 * prompt_s(400))


def test_prompts_come_before_decodes_where_both_share_an_instance() -> None:
    jobs = [Job(0.0, 100, 40), Job(0.05, 1000, 1)]
    serve(jobs, instance("both"))
    alone = [Job(0.0, 100, 40)]
    serve(alone, instance("both"))
    assert jobs[0].last_at > alone[0].last_at + 0.9 * prompt_s(1000)
    apart = [Job(0.0, 100, 40), Job(0.05, 1000, 1)]
    serve(apart, instance("prefill"), instance("decode"))
    assert apart[0].last_at < alone[0].last_at + 0.1 * prompt_s(1000)


def test_kv_that_takes_time_to_move_delays_later_tokens_only() -> None:
    jobs, slow = [[Job(0.0, 200, 10)] for _ in range(2)]
    serve(jobs, instance("prefill"), instance("decode"))
    serve(slow, instance("prefill"), instance("decode"), lambda job: 0.5)
    assert slow[0].first_at == jobs[0].first_at
    assert slow[0].last_at == pytest.approx(jobs[0].last_at + 0.5)


draws = st.lists(
    st.tuples(st.floats(0, 3), st.integers(1, 900), st.integers(0, 90)), min_size=1, max_size=14
)


def made(drawn: list[tuple[float, int, int]]) -> list[Job]:
    return [Job(at, prompt, output) for at, prompt, output in sorted(drawn)]


@settings(max_examples=30, deadline=None)
@given(draws, st.sampled_from([1, 2]), st.sampled_from([None, 256]), st.booleans())
def test_runs_of_steps_are_their_steps(
    drawn: list[tuple[float, int, int]], pp: int, chunk: int | None, is_published: bool
) -> None:
    """With REACH 1 every step is taken alone. Everybody is served, once and in order."""
    told: list[list[tuple[float, float]]] = []
    for reach in (64, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(phases, "REACH", reach)
            jobs = made(drawn)
            serve(jobs, instance("both", pp=pp, chunk=chunk, is_published=is_published))
            told.append([(job.first_at, job.last_at) for job in jobs])
    for found, alone in zip(*told, strict=True):
        assert found == pytest.approx(alone, abs=1e-9)
        assert math.isfinite(found[1]) and found[0] <= found[1]
    firsts = [first for first, _ in told[0]]
    assert firsts == sorted(firsts)


@settings(max_examples=20, deadline=None)
@given(draws, st.integers(1000, 3000), st.booleans())
def test_jobs_that_do_not_fit_together_wait_and_still_end(
    drawn: list[tuple[float, int, int]], room: int, is_published: bool
) -> None:
    jobs = made(drawn)
    serve(jobs, instance("prefill"), instance("decode", kv_tokens=room, is_published=is_published))
    free = made(drawn)
    serve(free, instance("prefill"), instance("decode", kv_tokens=10**9))
    assert all(
        job.last_at >= other.last_at - 1e-9 for job, other in zip(jobs, free, strict=True)
    ) or (sum(job.prompt + job.output for job in jobs) > room)
    assert all(math.isfinite(job.last_at) for job in jobs)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-4, 50), st.floats(1e-3, 0.2), st.floats(0, 1e-3))
def test_steps_until_is_the_fewest_that_reach(wait_s: float, first: float, growth: float) -> None:
    steps = steps_until(wait_s, first, growth)

    def total(num: int) -> float:
        return num * first + growth * num * (num - 1) / 2

    assert total(steps) >= wait_s - 1e-9
    assert steps == 1 or total(steps - 1) < wait_s + 1e-9
