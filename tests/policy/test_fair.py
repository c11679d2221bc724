"""Fair orders, held to their theorems in a real replica: the difference in service of tenants that stay backlogged."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Sequence

import pytest

from penstock.core.events import Arrived, Event
from penstock.core.types import Job, Slo
from penstock.policy import find
from penstock.policy.order.drr import Drr
from penstock.policy.order.vtc import Vtc
from tests.policy.served import Ask, Service, serve, waits
from tests.policy.test_order import ranks
from tests.policy.world import make_job

PROMPT, OUTPUT, JOBS = 120, 40, 4  # the longest of each, and how many run
HELD = JOBS * (PROMPT + OUTPUT)  # tokens that the running jobs can hold


def flood(seed: int, *, first: int = 90, second: int = 40, late_s: float = 0.0) -> list[Ask]:
    """Tenant a asks for very much at once, b for less and later; c now and then. All at their own sizes."""
    rng = random.Random(seed)
    asks = [Ask(0.0, "a", rng.randint(60, PROMPT), rng.randint(1, OUTPUT)) for _ in range(first)]
    asks += [
        Ask(late_s + 0.001 * n, "b", rng.randint(1, 60), rng.randint(20, OUTPUT))
        for n in range(second)
    ]
    asks += [
        Ask(rng.uniform(0, 20), "c", rng.randint(1, PROMPT), rng.randint(1, 9)) for _ in range(9)
    ]
    return asks


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("late_s", [0.0, 2.0])
def test_vtc_keeps_its_bound(seed: int, late_s: float) -> None:
    """Sheng et al., theorem 4.4: at most 2 max(w_p L_input, w_q M). Arrival order misses it by far."""
    bound = 2 * max(PROMPT, 2 * HELD)
    asks = flood(seed, late_s=late_s)
    found = Service(serve(Vtc(), asks, max_jobs=JOBS), "a", "b")
    assert found.most_unfair <= bound < min(found.together.values())
    if not late_s:
        unfair = Service(serve(find("order", "fcfs")(), asks, max_jobs=JOBS), "a", "b").most_unfair
        assert unfair > 2 * bound


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("quantum", [50.0, 600.0])
def test_drr_keeps_its_bound(seed: int, quantum: float) -> None:
    bound = 2 * (quantum + PROMPT + 2 * JOBS * OUTPUT)
    events = serve(Drr(quantum=quantum), flood(seed, late_s=2.0 * seed), max_jobs=JOBS)
    found = Service(events, "a", "b")
    assert found.most_unfair <= bound < 2 * min(found.together.values())


@pytest.mark.parametrize("policy", [Vtc(), Drr(quantum=100.0)], ids=["vtc", "drr"])
def test_a_pause_earns_no_credit(policy: Vtc | Drr) -> None:
    """b asks when a has long been served alone: it does not get all the time until it has caught up."""
    asks = flood(5, first=160, second=60, late_s=6.0)
    found = Service(serve(policy, asks, max_jobs=JOBS), "a", "b")
    assert found.together["a"] > 0.8 * found.together["b"] > 0


class NoLift(Vtc):
    def _lift(self, tenant: str) -> None:
        """As if pauses did earn credit."""


def test_without_the_lift_the_bound_is_broken() -> None:
    events = serve(NoLift(), flood(5, first=160, second=60, late_s=6.0), max_jobs=JOBS)
    assert Service(events, "a", "b").most_unfair > 2 * max(PROMPT, 2 * HELD)


@pytest.mark.parametrize("kind", [Vtc, Drr])
def test_shares_are_kept(kind: type[Vtc] | type[Drr]) -> None:
    rng = random.Random(2)
    asks = [Ask(0.0, t, rng.randint(1, 90), rng.randint(1, 40)) for t in "ab" for _ in range(120)]
    found = Service(serve(kind(shares={"a": 3.0}), asks, max_jobs=JOBS), "a", "b").together
    assert found["a"] / found["b"] == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("num_blocks", [24])
@pytest.mark.parametrize("kind", [Vtc, Drr])
def test_preempted_jobs_are_not_charged_twice(kind: type[Vtc] | type[Drr], num_blocks: int) -> None:
    """Memory for three long jobs: many are preempted, and service stays alike all the same."""
    asks = flood(7)
    events = serve(kind(), asks, max_jobs=JOBS, num_blocks=num_blocks)
    assert sum(getattr(event, "num_preemptions", 0) for event in events) > 5
    found = Service(events, "a", "b")
    assert found.most_unfair <= 2 * (512 + PROMPT + 2 * HELD)


FAIR = ("vtc", "drr", "sjf")


@pytest.mark.parametrize("name", FAIR)
def test_one_request_among_a_flood_is_served_soon(name: str) -> None:
    """A quarter of a minute of work waits when b asks for a little."""
    asks = [Ask(0.0, "a", 100, 40) for _ in range(160)] + [Ask(4.0, "b", 30, 5)]
    (fair_s,) = waits(serve(find("order", name)(), asks), "b")
    (fcfs_s,) = waits(serve(find("order", "fcfs")(), asks), "b")
    assert fair_s < 2.0 < 10.0 < fcfs_s


def test_counts_rank_tenants_as_if_they_were_admitted_one_by_one() -> None:
    """a has 100, b 0 and asks for 60, 30 and 30 tokens: after two of them it stands at 90, after three at 120."""
    policy = Vtc()
    policy._counts = {"a": 100.0}
    jobs = [tenanted(0, "a", 50), tenanted(1, "b", 60), tenanted(2, "b", 30), tenanted(3, "b", 30)]
    jobs += [tenanted(4, "a", 10), tenanted(5, "b", 10)]
    assert ranks(policy, jobs) == [1, 2, 3, 0, 5, 4]


def test_turns_go_round() -> None:
    """A quantum of 100: a's first two prompts fill its first turn, the third and b's long one need a second."""
    policy = Drr(quantum=100.0)
    jobs = [tenanted(seq, "a", 50) for seq in (0, 1, 2)]
    jobs += [tenanted(3, "b", 150), tenanted(4, "c", 100), tenanted(5, "b", 50)]
    for job in jobs:
        policy.observe(arrival(job))
    assert ranks(policy, jobs) == [0, 1, 4, 2, 3, 5]


def tenanted(seq: int, tenant: str, prompt: int) -> Job:
    job = make_job(seq, prompt)
    job.request = job.request.__class__(
        **{
            **{n: getattr(job.request, n) for n in ("id", "model", "prompt", "sampling")},
            "tenant": tenant,
        }
    )
    return job


def arrival(job: Job) -> Arrived:
    return Arrived(
        at=0.0, who="r", request=job.request.id, seq=job.seq, model="m", num_prompt=job.num_prompt,
        max_tokens=9, n=1, tenant=job.request.tenant, priority=0, slo=Slo(),
    )  # fmt: skip


@pytest.mark.parametrize("kind", [Vtc, Drr])
def test_a_policy_that_hears_the_same_decides_the_same(kind: type[Vtc] | type[Drr]) -> None:
    first = serve(kind(), flood(3), max_jobs=JOBS)
    assert told(first) == told(serve(kind(), flood(3), max_jobs=JOBS))


def told(events: Sequence[Event]) -> list[str]:
    return [repr(event) for event in events]


@pytest.mark.parametrize("kind", [Vtc, Drr])
def test_tenants_that_are_gone_are_forgotten_without_a_change(
    kind: type[Vtc] | type[Drr], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(4)
    asks = [
        Ask(0.05 * n, f"t{n if n % 3 else 0}", rng.randint(1, 90), rng.randint(1, 20))
        for n in range(300)
    ]
    keeping, forgetting = kind(), kind()
    keeping._most, forgetting._most = 1 << 30, 8
    monkeypatch.setattr(sys.modules[kind.__module__], "FORGOTTEN_AT", 8)
    kept = told(serve(keeping, asks))
    assert kept == told(serve(forgetting, asks))
    sizes = [len(getattr(each, "_counts", None) or each._turns) for each in (keeping, forgetting)]  # type: ignore[union-attr]
    assert sizes[0] > 150 > 60 > sizes[1]


@pytest.mark.parametrize("name", ["vtc", "drr"])
def test_parameters_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match="prompt_weight"):
        find("order", name)(prompt_weight=0, output_weight=0)
    with pytest.raises(ValueError, match=r"shares\.x"):
        find("order", name)(shares={"x": 0.0})


def test_policies_can_be_copied() -> None:
    policy = copy.deepcopy(Vtc())
    policy.observe(arrival(tenanted(0, "a", 5)))
    assert policy._counts == {"a": 0.0}
