"""Context that modelled replicas keep for each other: what steps take, who pays, and requests longer than a memory."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from penstock.assemble import assemble, modelled_leaves
from penstock.core.events import Event, Finished, Refused, Reported, Steered
from penstock.core.lending import Loaned, LoanOver, Recalled, Relocated, Spilled
from penstock.core.plans import Done, Opening, Plan, Work
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Caps, PlanId, ProgramId, Request, RequestId, Sampling
from penstock.cost.step import StepCost, StepFeatures
from penstock.lab.replay import replay_log
from penstock.lab.simulate import simulate
from penstock.lab.trial import deployment
from penstock.sim.channel import Link
from penstock.sim.lending import LOST, LendingExecutor
from penstock.sim.loop import run
from penstock.sim.transport import Fabric
from penstock.traffic import TraceMeta

LAYERS, SIZE, BLOCKS = 10, 16, 100
HOP_S = 0.002  # there and back
OWN_S = 0.001  # a token reads itself, which nobody waits for
CAPS = Caps(num_layers=LAYERS, max_context=1 << 20, max_repeat=1 << 20, lends=True)


class Plain:
    """1 s a step, 1 ms for each position that decodes read, 10 us for each pair of a prompt."""

    name, digest = "plain", "0"

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        return 1.0 + 1e-3 * features.decode_context + 1e-5 * features.prefill_pairs

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        return [self.seconds(features.grown(step), share) for step in range(count)]

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost:
        raise NotImplementedError


class Bench:
    """A home and two creditors, without fleets and replicas."""

    def __init__(self, row_bytes: int = 0) -> None:
        self.fabric = Fabric(Link(latency_s=HOP_S / 2, bytes_per_s=1e6))
        self.home, self.first, self.second = (
            LendingExecutor(
                Plain(),
                self.fabric,
                address=name,
                num_blocks=BLOCKS,
                block_size=SIZE,
                block_bytes=1000,
                row_bytes=row_bytes,
                caps=CAPS,
            )
            for name in ("home", "first", "second")
        )
        self.heard: list[Done] = []
        for executor in (self.home, self.first, self.second):
            executor.listen(self.heard.append)  # type: ignore[arg-type]
        for loan, creditor in enumerate((self.first, self.second)):
            address = creditor.sharing.lend(loan, range(21))
            self.home.sharing.borrow(loan, BLOCKS + 20 * loan, 20, address)

    async def step(
        self, executor: LendingExecutor, start: int, tokens: int = 1, *, away: Sequence[int] = ()
    ) -> float:
        """Seconds that one step of one job takes."""
        own = range(-(-(start + tokens) // SIZE) - len(away))
        request = Request(id=RequestId("r"), model="m", prompt=TracedPrompt(start), true_output=900)
        work = Work(1, start, tokens, True, (*away, *own), True)
        loop = asyncio.get_running_loop()
        at = loop.time()
        plan = Plan(id=PlanId(len(self.heard)), work=(work,), opened=(Opening(1, request, 0),))
        executor.launch(plan, 8)
        before = len(self.heard)
        while len(self.heard) == before:
            await asyncio.sleep(0.02)
        return self.heard[-1].ends[-1] - at


def test_a_step_takes_what_is_left_at_home_or_the_round_trips() -> None:
    async def main() -> None:
        bench = Bench()
        here = await bench.step(bench.first, 959)  # creditors' own jobs are whole
        assert here == pytest.approx(8 * (1 + 0.960) + 1e-3 * sum(range(8)))  # 8 steps at once
        # 640 of 960 positions are away: 0.32 s here cover the creditors' 0.32 s but not the ways.
        away = range(BLOCKS, BLOCKS + 40)
        assert await bench.step(bench.home, 959, away=away) == pytest.approx(
            1 + OWN_S + 0.320 + LAYERS * HOP_S
        )
        # Of 1,600 at home nothing of it shows.
        assert await bench.step(bench.home, 2239, away=away) == pytest.approx(1 + 1.6)
        # All at one creditor: it takes as long as there, and the ways.
        alone = range(BLOCKS, BLOCKS + 20)
        assert await bench.step(bench.home, 321, away=alone) == pytest.approx(
            1 + OWN_S + 0.320 + LAYERS * HOP_S
        )

    run(main())


def test_a_chunk_and_its_bytes() -> None:
    async def main() -> None:
        bench = Bench(row_bytes=5000)
        took = await bench.step(bench.home, 640, 64, away=range(BLOCKS, BLOCKS + 40))
        there = 1e-5 * 64 * 320 + LAYERS * HOP_S + 2 * 64 * 5000 / 1e6
        assert took == pytest.approx(1 + 1e-5 * 64 * 65 / 2 + there)

    run(main())


def test_a_creditor_pays_in_its_next_step() -> None:
    async def main() -> None:
        bench = Bench()
        loop = asyncio.get_running_loop()
        request = Request(id=RequestId("c"), model="m", prompt=TracedPrompt(9), true_output=900)
        work = Work(7, 9, 1, True, (0,), True)
        bench.first.launch(Plan(id=PlanId(90), work=(work,), opened=(Opening(7, request, 0),)), 50)
        began = loop.time()
        await asyncio.sleep(0.1)
        await bench.step(bench.home, 321, away=range(BLOCKS, BLOCKS + 20))
        await asyncio.sleep(1)
        (ended,) = [each for each in bench.heard if each.plan == 90]
        assert ended.steps_run == 1  # of 50: the next one is longer
        assert ended.ends[0] - began == pytest.approx(1.010)
        took, alone = [await bench.step(bench.first, 9) for _ in range(2)]
        assert took - alone == pytest.approx(0.320)  # 20 blocks of 16

    run(main())


def test_a_creditor_that_is_gone_ends_the_job() -> None:
    async def main() -> None:
        bench = Bench()
        told: list[str | None] = []
        bench.home.sharing.spill([(3, BLOCKS, 1)], told.append)
        await asyncio.sleep(0.01)
        assert told == [None] and bench.fabric.num_bytes == 1000
        await bench.first.stop()
        bench.home.sharing.spill([(3, BLOCKS + 1, 1)], told.append)
        await asyncio.sleep(0.01)
        assert told[1] == LOST
        await bench.step(bench.home, 321, away=range(BLOCKS, BLOCKS + 20))
        (output,) = bench.heard[-1].outputs
        assert output.error == LOST

    run(main())


# ---------------------------------------------------------------------------- a whole fleet


class Traffic:
    def __init__(self, lengths: dict[int, int], num: int = 30) -> None:
        self.lengths, self.num = lengths, num
        self.meta = TraceMeta("drawn", "drawn", num, num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        for place in range(self.num):
            yield (
                0.1 * place,
                Request(
                    id=RequestId(f"r{place}"),
                    model="default",
                    prompt=TracedPrompt(self.lengths.get(place, 900)),
                    sampling=Sampling(max_tokens=400),
                    true_output=60,
                ),
            )


class Together:
    """One session, so one replica: a long request that fills it, and short ones that come when it runs."""

    def __init__(self, num: int = 30) -> None:
        self.num, self.meta = num, TraceMeta("drawn", "drawn", num, num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        for place in range(self.num):
            yield (
                0.05 * place + 2.0 * (place > 0),
                Request(
                    id=RequestId(f"r{place}"),
                    model="default",
                    prompt=TracedPrompt(300 if place else 6500),
                    sampling=Sampling(max_tokens=400),
                    true_output=100 if place else 380,
                    program=ProgramId("same"),
                ),
            )


class Ears:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def played(traffic: Traffic, log: Path | None = None, *, lends: bool = True, **policy: Any) -> Ears:
    config = deployment(
        {"preset": "vllm-v1", "route": "least", "batch": {"max_tokens": 512}, **policy},
        replicas=3,
        lends=lends,
        cache={"num_blocks": 500, "prefix": False},
    )
    net = dataclasses.replace(config.net, latency_s=1e-4, kv_bytes_per_s=10e9)
    ears = Ears()
    simulate(
        dataclasses.replace(config, is_checked=True, net=net),
        traffic,
        listeners=(ears,),
        log_path=log,
    )
    return ears


def test_requests_longer_than_one_memory(tmp_path: Path) -> None:
    """Three of them at nearly the same time: each gets its turn, and everything is given back."""
    log = tmp_path / "log.jsonl"
    ears = played(Traffic({3: 10_000, 6: 12_000, 8: 9_000}), log)
    ended = {event.request: event for event in ears.of(Finished)}
    assert len(ended) == 30 and all(each.reason == "stop" for each in ended.values())
    assert all(each.num_output == 60 for each in ended.values())
    assert not ears.of(Refused) and len(ears.of(Spilled)) > 3
    assert ears.of(Recalled) and ears.of(Relocated)  # short ones come to creditors meanwhile
    lent = {event.loan for event in ears.of(Loaned) if event.error is None}
    over = [event.loan for event in ears.of(LoanOver)]
    assert lent and all(over.count(loan) >= 1 for loan in lent)
    last = {event.report.replica: event.report for event in ears.of(Reported)}
    assert len(last) == 3
    assert all(report.num_running == 0 or report.lent_blocks == 0 for report in last.values())
    for outcome in replay_log(log):
        assert outcome.difference is None, outcome


def test_what_no_fleet_has_room_for_is_refused_at_once() -> None:
    ears = played(Traffic({3: 30_000}))
    (refused,) = ears.of(Refused)
    assert refused.request == "r3" and refused.code == "ContextTooLong"
    assert len(ears.of(Finished)) == 29
    alone = played(Traffic({3: 10_000}), lends=False).of(Refused)
    assert {each.code for each in alone} == {"ContextTooLong"}


def test_who_waits_for_memory_that_is_lent_waits() -> None:
    """Nothing runs at a creditor that has lent most of what it has, and something waits there."""
    ears = played(Traffic({0: 15_000, 1: 3_000, 2: 3_000, 3: 9_000}, num=4))
    assert len(ears.of(Finished)) == 4 and len(ears.of(Spilled)) > 3


def test_a_policy_lends_for_what_runs(tmp_path: Path) -> None:
    """A long request fills a replica that others wait for; they get in when half of it is elsewhere."""
    log, names = tmp_path / "log.jsonl", dict[str, list[float]]()
    told: dict[str, dict[str, Any]]
    told = {"still": {}, "lent": {"move": {"name": "infinite-llm"}}}
    for name, policy in told.items():
        ears = played(Together(), log, **policy, route="session")
        names[name] = [e.first_token_at - e.arrived_at for e in ears.of(Finished)]
        assert len(names[name]) == 30
    assert any([event.loans for event in ears.of(Steered)]) and ears.of(Spilled)
    assert sum(names["lent"]) < sum(names["still"])
    for outcome in replay_log(log):
        assert outcome.difference is None, outcome


def test_a_creditor_that_drains_waits_for_what_it_has_lent() -> None:
    """It takes no requests and lends no more meanwhile, and the one that it keeps blocks for ends as ever."""

    async def main() -> None:
        config = deployment(
            {"preset": "vllm-v1", "route": "least", "batch": {"max_tokens": 512}},
            replicas=3,
            lends=True,
            cache={"num_blocks": 500, "prefix": False},
        )
        config = dataclasses.replace(config, is_checked=True)
        service = await assemble(config, modelled_leaves(config, Ears()))
        fleet = service.fleet("default")
        (_, asked), *_ = Traffic({0: 10_000}, num=1)
        serving = asyncio.ensure_future(service.submit(asked))
        while not any(report.lent_blocks and report.away_blocks == 0 for report in fleet.reports()):
            await asyncio.sleep(0.01)
        creditor = next(each.replica for each in fleet.reports() if each.lent_blocks)
        draining = asyncio.ensure_future(fleet.drain_replica(creditor))
        await asyncio.wait((serving, draining), return_when=asyncio.FIRST_COMPLETED)
        assert serving.done() and serving.exception() is None and not draining.done()
        await asyncio.wait_for(draining, 1.0)
        await asyncio.sleep(1.0)
        assert not any(report.lent_blocks for report in fleet.reports())
        await service.stop()

    run(main())


def test_a_step_is_no_larger_than_what_a_home_keeps_for_its_own() -> None:
    """The policy would take the whole prompt at once, and no home has room for it."""

    async def main() -> None:
        config = deployment(
            {"preset": "vllm-v1", "route": "least", "batch": {"max_tokens": 1 << 20}},
            replicas=2,
            lends=True,
            cache={"num_blocks": 500, "prefix": False},
        )
        ears = Ears()
        config = dataclasses.replace(config, is_checked=True)
        service = await assemble(config, modelled_leaves(config, ears))
        (_, asked), *_ = Traffic({0: 10_000}, num=1)
        await service.submit(asked)
        await service.stop()
        assert len(ears.of(Finished)) == 1

    run(main())
