"""Admission by future memory: the peak against memory counted step by step, and what nobody evicted follows from."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.events import Completed
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Job, Request, RequestId, Sampling
from penstock.lab.replay import replay_log
from penstock.lab.simulate import simulate
from penstock.lab.trial import deployment
from penstock.policy import TABLE, admit, find
from penstock.policy.admit.past_future import PastFuture
from penstock.policy.admit.peak import peak_blocks
from penstock.traffic import TraceMeta
from tests.laws import views
from tests.laws.model_ledger import ModelLedger
from tests.policy.world import Replica, make_job

jobs = st.lists(st.tuples(st.integers(1, 200), st.integers(0, 120)), min_size=1, max_size=12)


def walked(known: list[int], left: list[int], size: int, shared: int = 0) -> int:
    """The most blocks held in any step, `shared` of them by everybody."""
    most = 0
    for step in range(max(left) + 1):
        alive = [place for place, steps in enumerate(left) if steps >= step]
        held = [-(-(known[place] + step) // size) for place in alive]
        most = max(most, sum(held) - shared * (len(alive) - 1))
    return most


@given(jobs, st.sampled_from((1, 2, 4, 16, 48)))
def test_the_peak_is_the_most_that_is_ever_held(crowd: list[tuple[int, int]], size: int) -> None:
    known, left = [each[0] for each in crowd], [each[1] for each in crowd]
    assert peak_blocks(np.array(known), np.array(left), size=size) == walked(known, left, size)


@given(jobs, st.sampled_from((1, 4, 16)), st.integers(1, 8))
def test_a_common_beginning_is_counted_once(
    crowd: list[tuple[int, int]], size: int, shared: int
) -> None:
    known, left = [each[0] + shared * size for each in crowd], [each[1] for each in crowd]
    found = peak_blocks(
        np.array(known), np.array(left), size=size, shared=shared * (len(crowd) - 1)
    )
    assert found == pytest.approx(walked(known, left, size, shared))


def test_the_peak_by_hand() -> None:
    """100 + 10 for 30 more, 50 for 10 more: 160 + 20 when the shorter ends, 140 at the end; in the source's tokens."""
    assert peak_blocks(np.array([50, 110]), np.array([10, 30]), size=1) == 180
    assert peak_blocks(np.array([50, 110]), np.array([10, 80]), size=1) == 190


# ---------------------------------------------------------------------------- with the true lengths


class Oracle:
    """Knows the lengths; `asked` counts."""

    def __init__(self, lengths: dict[int, int]) -> None:
        self.lengths, self.asked = lengths, 0

    def quantile(self, job: Any, q: float) -> int:
        return self.sample(job, q)

    def sample(self, job: Any, u: float) -> int:
        self.asked += 1
        return min(self.lengths[job.seq], int(job.max_tokens))


def crowd(rng: random.Random, num: int) -> tuple[list[Job], dict[int, int]]:
    some = [
        make_job(seq, rng.randrange(1, 60), max_tokens=rng.randrange(1, 90)) for seq in range(num)
    ]
    return some, {job.seq: rng.randrange(1, job.max_tokens + 1) for job in some}


def drained(name: str, seed: int, monkeypatch: pytest.MonkeyPatch, **parameters: Any) -> Replica:
    """A crowd that fills the memory several times over, served to the end."""
    rng = random.Random(seed)
    waiting, lengths = crowd(rng, 40)
    monkeypatch.setattr(views, "HalfLengths", lambda: Oracle(lengths))
    chosen = find("admit", name)(**parameters)
    ask = views.make_policy
    monkeypatch.setattr(
        views, "make_policy", lambda kind, named: chosen if kind == "admit" else ask(kind, named)
    )
    it = Replica(find("batch", "vllm-v1")(), ModelLedger(60, 4), admit=name, lengths=lengths)
    it.waiting = waiting
    it.run()
    assert sorted(job.seq for job in it.ended) == list(range(40))
    monkeypatch.undo()
    return it


@pytest.mark.parametrize("seed", range(8))
def test_with_the_true_lengths_nobody_is_evicted(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = drained("past-future", seed, monkeypatch, reserve=0.0)
    assert sum(job.num_preemptions for job in told.ended) == 0
    careful = drained("conservative", seed, monkeypatch)
    assert sum(job.num_preemptions for job in careful.ended) == 0
    brave = drained("full-fit", seed, monkeypatch)
    assert sum(job.num_preemptions for job in brave.ended) > 0


def test_promising_twice_the_memory_evicts(monkeypatch: pytest.MonkeyPatch) -> None:
    evicted = [
        sum(
            job.num_preemptions
            for job in drained("conservative", 1, monkeypatch, overcommit=factor).ended
        )
        for factor in (1.0, 1.3, 3.0)
    ]
    assert evicted[0] == 0 and evicted[2] > evicted[0] and evicted == sorted(evicted)


# ---------------------------------------------------------------------------- the mechanism of an attempt


class Script:
    """Draws from a list, and says how many it gave."""

    def __init__(self) -> None:
        self.num = 0

    def random(self) -> float:
        self.num += 1
        return 0.5

    def randrange(self, stop: int, /) -> int:
        return 0


def asked(policy: Any, job: Job, running: list[Job], ledger: ModelLedger, **more: Any) -> str:
    view = admit.View(
        now=more.get("now", 0.0),
        rng=more.get("rng", Script()),
        job=job,
        tokens=1,
        ledger=ledger,  # type: ignore[arg-type]
        running=running,
        lengths=more.get("lengths", Oracle({})),
    )
    decision = policy.decide(view)
    admit.law(view, decision)
    return str(decision.answer)


def a_step(steps_run: int) -> Completed:
    return Completed(
        at=0.0, who="r", plan=0, steps_run=steps_run, ends=(0.0,) * steps_run, outputs=()
    )


def test_several_sets_for_few_jobs_and_one_for_many() -> None:
    """41 jobs: int(200 / 41) + 1 = 5 sets; 60: 4; 250: 1. Each set draws for all who run, and for the candidate."""
    for num, sets in ((3, 5), (41, 5), (60, 4), (250, 1)):
        ledger = ModelLedger(10_000, 4)
        running = [make_job(seq, 8, output=2, computed=8) for seq in range(num)]
        assert all(ledger.reserve(job, 9) for job in running)
        rng, lengths = Script(), Oracle({seq: 50 for seq in range(num + 2)})
        policy, fork = PastFuture(), ledger.fork()
        for candidate in (num, num + 1):  # the second of one step meets the same draws
            assert (
                asked(policy, make_job(candidate, 8), running, fork, rng=rng, lengths=lengths)
                == "yes"
            )
        assert rng.num == sets * (num + 2)


def test_after_a_refusal_some_steps_pass_before_the_next_attempt() -> None:
    ledger = ModelLedger(100, 4)
    running = [make_job(0, 100, output=2, computed=101)]
    assert ledger.reserve(running[0], 102)
    lengths, policy, rng = Oracle({0: 100, 1: 100}), PastFuture(every_steps=3), Script()
    policy.reserve, said = 0.0, []
    for step in range(8):
        before = rng.num
        said.append(
            asked(
                policy, make_job(1, 200), running, ledger.fork(), rng=rng, lengths=lengths, now=step
            )
        )
        said[-1] += "*" * (rng.num > before)
        policy.observe(a_step(1))
        if step == 4:
            lengths.lengths = {0: 3, 1: 10}  # now it would fit
    assert said == ["later*", "later", "later", "later*", "later", "later", "yes*", "yes*"]


def test_a_refusal_stands_until_the_next_attempt_and_one_for_memory_until_somebody_ends() -> None:
    ledger, policy = ModelLedger(100, 4), PastFuture(every_steps=5, reserve=0.0)
    running = [make_job(0, 100, output=2, computed=101)]
    assert ledger.reserve(running[0], 102)

    def stands(num_prompt: int) -> int:
        job = make_job(1, num_prompt)
        lengths = Oracle({0: 100, 1: 100})
        view = admit.View(0.0, Script(), job, 1, ledger, running, lengths)  # type: ignore[arg-type]
        decision = policy.decide(view)
        assert decision.answer == "later"
        return decision.stable_for

    assert stands(298) == admit.STABLE
    assert stands(200) == 5
    policy.observe(a_step(3))
    assert stands(200) == 2
    policy.observe(a_step(2))
    assert stands(200) == 5


def test_nothing_is_drawn_while_the_prompt_does_not_fit() -> None:
    """So steps that run as one, during which nobody is asked, leave the stream of chance as single ones do."""
    ledger, rng, policy = ModelLedger(20, 4), Script(), PastFuture()
    running = [make_job(0, 60, output=2, computed=61)]
    assert ledger.reserve(running[0], 62)
    told = [
        asked(policy, make_job(1, 40, max_tokens=9), running, ledger, rng=rng, now=at)
        for at in range(5)
    ]
    assert told == ["later"] * 5 and rng.num == 0


def test_whoever_runs_alone_is_never_refused_for_what_it_may_write() -> None:
    lengths = Oracle({0: 40})
    for name in ("past-future", "conservative"):
        job = make_job(0, 36, max_tokens=40)  # 75 positions in 19 of 19 blocks, above any reserve
        assert (
            asked(find("admit", name)(), job, [], ModelLedger(19, 4).fork(), lengths=lengths)
            == "yes"
        )


def test_a_prefix_that_others_hold_is_no_memory_of_the_candidate() -> None:
    """Two jobs over a prefix of 10 blocks, 4 blocks of their own each in the end: 18 of 20, but 28 if counted twice."""
    blocks = [bytes((place,)) for place in range(10)]
    ledger = ModelLedger(20, 4)
    first = make_job(0, 41, max_tokens=16, output=1, hashes=blocks)
    assert ledger.reserve(first, 41)
    first.computed, first.status = 41, "running"
    lengths = Oracle({0: 15, 1: 15})
    for name, expected in (("conservative", "yes"), ("past-future", "yes")):
        second = make_job(1, 41, max_tokens=16, hashes=blocks)
        assert (
            asked(find("admit", name)(), second, [first], ledger.fork(), lengths=lengths)
            == expected
        )
        stranger = make_job(1, 41, max_tokens=16)
        assert (
            asked(find("admit", name)(), stranger, [first], ledger.fork(), lengths=lengths)
            == "later"
        )


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("past-future", {"reserve": 1.0}),
        ("past-future", {"max_sets": 0}),
        ("past-future", {"every_steps": 0}),
        ("conservative", {"overcommit": 0.0}),
    ],
)
def test_parameters_that_make_no_sense_are_refused(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        find("admit", name)(**wrong)


# ---------------------------------------------------------------------------- in a replica


@dataclasses.dataclass
class Burst:
    """Answers of 5 to 200 tokens, all told max_tokens 200, faster than they can be served."""

    num: int = 150
    meta: TraceMeta = dataclasses.field(default_factory=lambda: TraceMeta("burst", "drawn"))

    def __iter__(self) -> Any:
        rng = random.Random(7)
        for place in range(self.num):
            yield (
                place * 0.05,
                Request(
                    id=RequestId(f"r{place}"),
                    model="default",
                    prompt=TracedPrompt(rng.randrange(20, 200)),
                    sampling=Sampling(max_tokens=200),
                    tenant=f"t{place % 3}",
                    true_output=rng.randrange(5, 200),
                ),
            )


def test_it_learns_in_a_replica_and_is_replayed(tmp_path: Path) -> None:
    """Fewer evictions than full fit and more at once than conservative, and every decision can be taken again."""
    preempted, lasted = {}, {}
    for name in ("full-fit", "past-future", "conservative"):
        log = tmp_path / f"{name}.jsonl"
        config = deployment(
            {"admit": name},
            cache__num_blocks=150,
            cache__prefix=False,
            lengths={"enough": 20, "window": 100, "by": ["tenant"], "seeds": 10},
        )
        found = simulate(config, Burst(), log_path=log)
        preempted[name] = found.figures.all.num_preemptions
        lasted[name] = found.figures.duration_s
        if name == "past-future":
            assert [each.difference for each in replay_log(log)] == [None, None]
    assert preempted["conservative"] == 0 < preempted["full-fit"]
    assert preempted["past-future"] <= preempted["full-fit"] / 3
    assert lasted["full-fit"] < lasted["conservative"]
    assert lasted["past-future"] < 0.95 * lasted["conservative"]


def test_both_are_found_by_name() -> None:
    assert {"past-future", "conservative"} <= set(TABLE["admit"])
