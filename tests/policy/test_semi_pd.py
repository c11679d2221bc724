"""semi-PD on a real replica in virtual time: two lanes over one ledger, their shares, and who moves them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from penstock.core.clock import sleep_until
from penstock.core.events import Completed, Event, Finished, Stepped
from penstock.core.limits import Holder
from penstock.core.plans import Plan
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Caps, PlanId, Request, RequestId, Sampling, Slo
from penstock.core.views import Rng
from penstock.cost.fitted import Fitted
from penstock.cost.lengths import RecentLengths
from penstock.cost.predict import StepPredictor
from penstock.cost.sharing import SHARINGS
from penstock.engine.limits import BoundLimits
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy import find
from penstock.sim.lanes import LanedExecutor
from penstock.sim.loop import run

# A step takes 10 ms and 1 ms a token, which fewer cores make longer.
MODEL = Fitted({"step": 0.01, "token": 1e-3}, name="", digest="", num_layers=1)


class Spy(LanedExecutor):
    """Remembers plans as they were launched."""

    plans: list[Plan]

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        self.plans.append(plan)
        return super().launch(plan, repeat)


@dataclass
class Run:
    """`asks`: (at, prompt, output). Decisions are held to their law, blocks recounted after every turn."""

    asks: Sequence[tuple[float, int, int]]
    policy: Any
    num_blocks: int = 1 << 12
    max_lanes: int = 2
    max_repeat: int = 1 << 20
    slo: Slo = Slo()
    events: list[Event] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def go(self) -> Run:
        run(self._main())
        return self

    async def _main(self) -> None:
        caps = Caps(
            num_layers=1, max_context=1 << 14, max_lanes=self.max_lanes,
            max_total_share=float(self.max_lanes), max_repeat=self.max_repeat,
        )  # fmt: skip
        spy = Spy(MODEL, caps=caps, sharing=SHARINGS["fair"], bytes_per_s=1e12)
        spy.plans = self.plans
        replica = Replica(
            ReplicaConfig(num_blocks=self.num_blocks, block_size=4, is_checked=True),
            spy,
            ReplicaPolicies(
                order=find("order", "fcfs")(),
                admit=find("admit", "full-fit")(),
                batch=self.policy,
                evict=find("evict", "retract")(),
                blocks=find("evict", "lru")(),
            ),
            Predictors(cost=StepPredictor(MODEL, 1), lengths=RecentLengths()),
            log=self,
        )
        ended = asyncio.get_running_loop().create_task(replica.run())
        for place, (at, prompt, output) in enumerate(self.asks):
            await sleep_until(at)
            request = Request(
                id=RequestId(f"r{place}"), model="m", prompt=TracedPrompt(prompt),
                sampling=Sampling(max_tokens=output + 5), slo=self.slo, true_output=output,
            )  # fmt: skip
            replica.submit(request, every_token=False)
        await replica.drain()
        await replica.stop()
        await ended

    def shares(self, role: str) -> list[float]:
        is_decode = role == "decode"
        return [
            plan.share for plan in self.plans if all(w.tokens == 1 for w in plan.work) == is_decode
        ]


def make(**parameters: Any) -> Any:
    return find("batch", "semi-pd")(**parameters)


def test_decodes_go_on_while_a_prompt_is_computed() -> None:
    """A prompt of 1,000 takes 1 s and more; the other job's tokens come every step of the decode lane meanwhile."""
    it = Run([(0.0, 10, 200), (1.0, 1000, 5)], make(is_elastic=False)).go()
    (done,) = [e for e in it.of(Completed) if any(seq == 1 for seq, *_ in e.outputs)][:1]
    began = next(e.at for e in it.of(Stepped) if (1, 1000) in e.chunks)
    assert done.ends[-1] - began == pytest.approx(0.01 + 1.0 / 0.6)
    inside = [e for e in it.of(Completed) if began < e.at < done.at and e.outputs[0][0] == 0]
    gaps = [b.at - a.at for a, b in zip(inside, inside[1:], strict=False)]
    assert len(gaps) > 20 and gaps == pytest.approx([0.01 + 0.001 / 0.4] * len(gaps))
    assert {e.num_output for e in it.of(Finished)} == {200, 5}


def test_a_finished_prompt_joins_the_next_decode_step() -> None:
    it = Run([(0.0, 10, 200), (1.0, 500, 5)], make()).go()
    done = next(e for e in it.of(Completed) if any(seq == 1 for seq, *_ in e.outputs))
    later = [e for e in it.of(Stepped) if e.at >= done.at and e.plan is not None]
    assert {seq for seq, _ in later[0].chunks} <= {0, 1}
    joined = next(e for e in later if any(seq == 1 for seq, _ in e.chunks))
    assert {seq for seq, _ in joined.chunks} == {0, 1} and joined.at - done.at <= 0.03


def test_an_idle_lane_lends_its_cores() -> None:
    asks = [(0.0, 10, 200), (1.0, 1000, 5)]
    lent = Run(asks, make()).go()
    assert lent.shares("prefill") == [1.0, 0.6]
    assert lent.shares("decode")[0] == 1.0 and 0.4 in lent.shares("decode")
    kept = Run(asks, make(is_elastic=False)).go()
    assert set(kept.shares("prefill")) == {0.6} and set(kept.shares("decode")) == {0.4}


def test_without_a_partition_both_lanes_have_all_cores() -> None:
    it = Run([(0.0, 10, 200), (1.0, 1000, 5)], make(prefill_share=1.0, decode_share=1.0)).go()
    assert set(it.shares("prefill") + it.shares("decode")) == {1.0}


@pytest.mark.parametrize("seed", range(6))
def test_everybody_finishes_where_memory_is_short(seed: int) -> None:
    """Retracted jobs come back as prompts; nobody loses a token, and no block stays held (checked at every turn)."""
    rng = random.Random(seed)
    asks = [(0.05 * place, rng.randrange(1, 60), rng.randrange(20, 60)) for place in range(25)]
    policy = make(chunk_tokens=rng.choice((7, 16, 200)), init_ratio=0.1, max_jobs=12)
    it = Run(asks, policy, num_blocks=30).go()
    ended = {e.request: e.num_output for e in it.of(Finished)}
    assert ended == {f"r{place}": output for place, (_, _, output) in enumerate(asks)}
    assert sum(e.num_preemptions for e in it.of(Finished)) > 0
    assert {e.lane for e in it.of(Stepped) if e.plan is not None} == {0, 1}


def test_steps_in_runs_tell_the_same_as_single_ones() -> None:
    rng = random.Random(3)
    asks = [(1.5 * place, rng.randrange(1, 400), rng.randrange(1, 90)) for place in range(15)]
    runs = [Run(asks, make(), max_repeat=most).go() for most in (1, 1 << 20)]
    assert len(runs[1].plans) < 0.8 * len(runs[0].plans)
    lives = [
        {e.request: (e.first_token_at, e.last_token_at, e.num_output) for e in it.of(Finished)}
        for it in runs
    ]
    assert lives[0].keys() == lives[1].keys()
    for name, told in lives[0].items():
        assert told == pytest.approx(lives[1][name])


def test_with_one_lane_it_is_sglang() -> None:
    rng = random.Random(1)
    asks = [(0.1 * place, rng.randrange(1, 300), rng.randrange(1, 50)) for place in range(30)]
    chunks = [
        [e.chunks for e in Run(asks, policy, max_lanes=1).go().of(Stepped)]
        for policy in (make(), find("batch", "sglang")())
    ]
    assert chunks[0] == chunks[1] and len(chunks[0]) > 30


@dataclass
class Told:
    """A limit policy that gives prefill 0.3 until 1.5 s, then 0.7."""

    asked: list[tuple[float, Sequence[Holder], float]] = field(default_factory=list)

    def ask(
        self, now: float, rng: Rng, holders: Sequence[Holder], supply: float
    ) -> dict[str, float]:
        self.asked.append((now, holders, supply))
        x = 0.3 if now < 1.5 else 0.7
        return {"prefill": x, "decode": 1 - x}

    def observe(self, event: Event) -> None: ...


def test_a_change_of_shares_holds_from_the_next_launch_on() -> None:
    policy, told = make(is_elastic=False), Told()
    policy.bind_limits(told)
    it = Run([(0.0, 10, 200), (1.0, 600, 5), (1.2, 30, 2)], policy).go()
    assert it.shares("prefill") == [0.3, 0.3, 0.7]  # the second ran across the change
    steps = it.of(Stepped)
    change = [e for e in steps if "shares 30%/70% -> 70%/30%" in e.why]
    assert len(change) == 1 and change[0].at >= 1.5
    uses = {name: [] for name in ("prefill", "decode")}
    for _, holders, supply in told.asked:
        assert supply == 2.0
        for holder in holders:
            uses[holder.name] += holder.uses
    assert [(use.cap, use.amount) for use in uses["prefill"]] == [(0.3, 10), (0.3, 600), (0.7, 30)]
    assert uses["prefill"][1].seconds == pytest.approx(0.01 + 0.6 / 0.3)
    assert sum(use.times * use.amount for use in uses["decode"]) >= 200


def test_the_controller_moves_the_split_of_a_replica_that_misses_first_tokens() -> None:
    policy = make(prefill_share=0.3, decode_share=0.7, is_elastic=False)
    policy.bind_limits(BoundLimits(find("limit", "semi-pd")(window_s=5.0, may_overlap=False)))
    asks = [(1.0 * place, 200, 20) for place in range(80)]
    it = Run(asks, policy, slo=Slo(ttft_s=0.6, tpot_s=0.5)).go()
    shares = it.shares("prefill")
    assert shares[0] == 0.3 and shares[-1] >= 0.5
    moves = [e.why for e in it.of(Stepped) if "shares" in e.why]
    assert moves[0].endswith("shares 30%/70% -> 40%/60%")  # a step of the grid at a time
    ttft = [e.first_token_at - e.arrived_at for e in it.of(Finished)]
    assert max(ttft[-20:]) < 0.6 < max(ttft[:60])


def test_bad_parameters_are_named() -> None:
    for name in ("prefill_share", "decode_share"):
        with pytest.raises(ValueError, match=name):
            make(**{name: 0.05})
