"""JITServe by hand: what jobs need and are worth, who is reserved for, who pauses and who leaves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from penstock.core.events import Completed, Stepped
from penstock.core.types import Job, Slo
from penstock.core.views import NO_PROGRAMS, Outlook
from penstock.policy import admit, find, order
from penstock.policy.bandwidth import FIRST_UNIT_S, HOPELESS, Docket, Needs, Progress, reserve
from penstock.policy.batch.jit import Jit
from penstock.policy.order.jit_density import JitDensity
from tests.laws.model_ledger import ModelLedger
from tests.laws.views import Columns, Glass, LinearCost
from tests.policy.world import Replica, make_job

U = FIRST_UNIT_S
STREAM, ANSWER = Slo(ttft_s=1.0, tpot_s=0.1), Slo(deadline_s=10.0)


@dataclass
class Told:
    """The same of every job: `bound` from the quantile 0.9 on, else `usual`."""

    bound: int = 200
    usual: int = 100

    def quantile(self, job: Any, q: float) -> int:
        return max(job.num_output + 1, self.bound if q > 0.9 else self.usual)

    def quantiles(self, jobs: Sequence[Any], q: float) -> list[int]:
        return [self.quantile(job, q) for job in jobs]

    def sample(self, job: Any, u: float) -> int:
        return self.usual


def needs_of(jobs: list[Job], now: float, programs: Any = NO_PROGRAMS) -> Needs:
    docket = Docket(0.95, 0.5, 50, 100)
    view: Any = SimpleNamespace(now=now, lengths=Told(), programs=programs)
    return docket.needs(view, jobs, Progress.of(jobs))


def decoding(seq: int, slo: Slo, output: int, first_at: float) -> Job:
    job = make_job(seq, 50, max_tokens=1000, output=output, computed=50 + output - 1, slo=slo)
    job.arrived_at, job.first_token_at = 0.0, first_at
    return job


def test_an_answer_with_a_deadline() -> None:
    job = make_job(0, 200, max_tokens=1000, arrived_at=0.0, slo=ANSWER)
    found = needs_of([job], now=2.0)
    work_s = U * (200 + 200 / 100)
    assert found.work_s[0] == pytest.approx(work_s)
    assert found.bandwidth[0] == pytest.approx(work_s / 8)
    assert found.worth[0] == 100
    assert found.latest_at[0] == pytest.approx(10 - work_s)
    late = needs_of([job], now=8.5)  # the usual 100 tokens take 2.04 s, 1.5 s are left
    assert late.worth[0] < HOPELESS


def test_a_stream_needs_its_pace_and_loses_what_it_is_late() -> None:
    on_time = decoding(0, STREAM, output=20, first_at=1.0)  # the next token is due at 3.0
    found = needs_of([on_time], now=2.9)
    assert found.bandwidth[0] == pytest.approx(U / 0.1)
    assert found.worth[0] == 80
    assert found.latest_at[0] == pytest.approx(3.0 - U)
    late = needs_of([on_time], now=3.78)  # by 0.8 s; it gains 0.08 s with each token
    assert late.worth[0] == pytest.approx(80 - 0.8 / 0.08)
    assert needs_of([on_time], now=20.0).worth[0] < HOPELESS


def test_a_call_of_a_run_counts_with_the_whole_of_it() -> None:
    class Programs:
        def outlook(self, job: Any) -> Outlook:
            return Outlook(3.0, 300.0, 400.0, 2.0, 500.0, 30.0, 12.0)

    jobs = [decoding(seq, ANSWER, output=50, first_at=1.0) for seq in (0, 1)]
    for job in jobs:
        object.__setattr__(job.request, "program", "p")
    found = needs_of(jobs, now=5.0, programs=Programs())
    assert found.work_s[0] == pytest.approx(U * (150 + 400))
    assert found.bandwidth[0] == pytest.approx(U * 550 / (30 - 2 - 5))
    assert found.worth[0] == 100 + 500
    assert found.usual_s[0] == pytest.approx(U * (2 * 50 + 300))  # both calls, the later ones once
    assert found.latest_at[0] == pytest.approx(12 - U * 150)


def test_unheard_jobs_and_a_moving_table() -> None:
    docket = Docket(0.95, 0.5, 50, 100)
    view: Any = SimpleNamespace(now=0.0, lengths=Told(), programs=NO_PROGRAMS)
    for start in (0, 5000, 700):
        jobs = [make_job(seq, 10, max_tokens=50, slo=ANSWER) for seq in range(start, start + 30)]
        found = docket.needs(view, jobs, Progress.of(jobs))
        assert np.allclose(found.work_s, U * (50 + 0.1))


def test_bandwidth_is_reserved_dearest_first_until_places_are_taken() -> None:
    nothing = np.zeros(4)
    needs = Needs(
        work_s=np.ones(4),
        usual_s=np.array([1.0, 2.0, 1.0, 1.0]),
        bandwidth=np.array([0.6, 0.1, 0.5, 0.7]),
        worth=np.array([30.0, 100.0, 20.0, 0.1]),
        latest_at=nothing,
        is_stream=nothing > 0,
    )
    is_reserved, score = reserve(needs, 1.0, False)
    assert score.tolist() == [30, 50, 20, 0.1]
    assert is_reserved.tolist() == [True, True, False, False]
    by_bandwidth, _ = reserve(needs, 1.0, True)
    assert by_bandwidth.tolist() == [True, True, False, False]
    assert not reserve(needs, 9.0, False)[0][3], "nothing is reserved for what cannot be in time"


# ---------------------------------------------------------------------------- batches


def world(jobs: list[Job], policy: Jit, blocks: int = 400) -> Replica:
    it = Replica(policy, ModelLedger(blocks, 4), find("order", "jit-density")())
    for job in jobs:
        if job.computed:
            it.start(job)
        else:
            it.waiting.append(job)
    return it


def test_streams_take_turns_at_their_pace() -> None:
    """Three streams of a token in 100 ms share one place of 20 ms a step: each is served before its token is due."""
    jobs = [decoding(seq, Slo(ttft_s=1.0, tpot_s=0.1), 10, 0.0) for seq in range(3)]
    it = world(jobs, Jit(max_sequences=1))
    it.now = 0.95
    served = []
    for _ in range(9):
        (chunk,) = it.step().chunks
        served.append(chunk[0])
    assert {served.count(seq) for seq in range(3)} == {3}
    for job in jobs:
        assert job.num_output == 13


def test_who_cannot_be_in_time_gives_way() -> None:
    late = decoding(0, Slo(deadline_s=1.0), 10, 0.5)
    good = decoding(1, Slo(deadline_s=100.0), 10, 0.5)
    it = world([late, good], Jit(max_sequences=1))
    it.now = 5.0
    assert it.step().chunks == ((1, 1),)


def test_a_dear_newcomer_takes_memory_only_from_the_worthless() -> None:
    late = decoding(0, Slo(deadline_s=1.0), 10, 0.5)
    good = decoding(1, Slo(deadline_s=100.0), 10, 0.5)
    new = make_job(2, 40, max_tokens=40, arrived_at=5.0, slo=Slo(deadline_s=50.0))
    it = world([late, good, new], Jit(max_sequences=3), blocks=36)
    it.now = 5.0
    line = it.step()
    assert line.evicted == (0,) and line.admitted == (2,)
    it = world([late, good, new], Jit(max_sequences=3, max_swaps=0), blocks=36)
    it.now = 5.0
    assert it.step().evicted == ()


@pytest.mark.parametrize("bad", [{"max_sequences": 0}, {"margin": 0.5}, {"quantile": 1.0}])
def test_parameters_that_make_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Jit(**bad)


# ---------------------------------------------------------------------------- order and admission


def ranked(jobs: list[Job], now: float, **parameters: Any) -> list[int]:
    waiting = [Glass(job) for job in jobs]
    view: Any = order.View(
        now, random.Random(0), waiting, [], LinearCost(), Told(), lambda: Columns(waiting)
    )
    return [job.seq for job in JitDensity(**parameters).decide(view).ranking]


def test_dearest_first_and_the_hopeless_last() -> None:
    jobs = [
        make_job(0, 10, max_tokens=900, arrived_at=0.0, slo=Slo(deadline_s=3.0)),  # 2 s needed
        make_job(1, 900, max_tokens=900, arrived_at=0.0, slo=Slo(deadline_s=60.0)),
        make_job(2, 10, max_tokens=900, arrived_at=0.0, slo=Slo(deadline_s=60.0)),
    ]
    assert ranked(jobs, now=0.5) == [0, 2, 1]
    assert ranked(jobs, now=2.5) == [2, 1, 0]


def test_the_window_takes_neighbours_in_length() -> None:
    prompts = (10, 3000, 12, 2900, 14, 3100)
    jobs = [make_job(seq, prompt, max_tokens=100) for seq, prompt in enumerate(prompts)]
    assert set(ranked(jobs, now=0.0, slots=3, spread=2.0)[:3]) == {0, 2, 4}


def test_admission_adds_up_bandwidth() -> None:
    policy = find("admit", "jit-bandwidth")(slots=1)
    running = [Glass(decoding(seq, STREAM, 10, 0.0)) for seq in range(4)]  # 0.2 of a place each
    ledger = ModelLedger(400, 4)

    def answer(seq: int, slo: Slo) -> str:
        job: Any = Glass(make_job(seq, 10, max_tokens=300, arrived_at=1.0, slo=slo))
        view: Any = admit.View(1.0, random.Random(0), job, 10, ledger, running, Told())
        policy._step = None  # as in another step
        decision: str = policy.decide(view).answer
        return decision

    assert answer(7, Slo(ttft_s=1.0, tpot_s=0.2)) == "yes"  # 0.1 more
    assert answer(8, Slo(deadline_s=4.5)) == "later"  # 0.89 more
    assert answer(9, Slo()) == "yes"


def launch(plan: int, at: float) -> Stepped:
    return Stepped(
        at=at, who="r", plan=plan, lane=0, digest="", repeat=1, chunks=(), admitted=(), evicted=(),
        num_running=1, num_waiting=0, free_blocks=1,
    )  # fmt: skip


def test_steps_that_ran_as_one_teach_what_single_ones_do() -> None:
    """The unit is the mean of the last ten steps, however they were launched."""
    ends = tuple(accumulate([0.01 + 0.002 * (place % 5) for place in range(14)]))
    units = []
    for runs in ([1] * 14, [9, 5], [2, 12]):
        docket, at, plan = Docket(0.95, 0.5, 50, 512), 0.0, 0
        left = list(ends)
        for size in runs:
            now, left = left[:size], left[size:]
            docket.observe(launch(plan, at))
            docket.observe(
                Completed(
                    at=now[-1], who="r", plan=plan, steps_run=size, ends=tuple(now), outputs=()
                )
            )
            at, plan = now[-1], plan + 1
        units.append(docket.unit_s)
    assert units[0] == units[1] == units[2] == pytest.approx((ends[-1] - ends[3]) / 10)
