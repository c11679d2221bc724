"""Two lanes of the real engine: prompts in one, answers in the other, over one memory. What they write stays the same.

Shares are numbers of cores on a machine with two, prefill/decode: 1/1, 2/1, 1/2 and 2/2, of which the last three let
both lanes meet on a core. On a machine with one core all of them are the same.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from penstock.cluster.spec import ReplicaSpec
from penstock.cluster.worker import open_torch
from penstock.core.errors import BadConfig
from penstock.core.events import Completed, Finished, Stepped
from penstock.core.plans import Done, Plan
from penstock.core.types import PlanId, Sampling
from penstock.engine.torch import jobs
from penstock.engine.torch.cores import (
    CAN_BIND,
    Seat,
    _Body,
    _Region,
    compute_with,
    cores_here,
    cores_of,
)
from penstock.engine.torch.decoder import Decoder, Layer, StepInput
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.kernels.library import openmp_region
from penstock.engine.torch.open import EngineConfig, open_executor
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.lab.replay import ReplicaParts, replay_replica
from penstock.policy import find
from tests.engine.torch.driver import GREEDY, Driver, Held
from tests.engine.torch.models import saved
from tests.engine.torch.served import NoPredictions
from tests.engine.torch.test_against_transformers import TOLERANCE, judged, prompts
from tests.engine.torch.test_layers_and_stops_live import Live, until

SHARES = {"1/1": (0.5, 0.5), "2/1": (1.0, 0.5), "1/2": (0.5, 1.0), "2/2": (1.0, 1.0)}
ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=2, num_blocks=64, lanes=2)
BLOCKS, TOKENS = 12, 20
LIKELY = Sampling(temperature=0.0, ignore_eos=True, max_tokens=TOKENS, logprobs=4)
LONG = tuple(3 + (11 * at) % 500 for at in range(450))
SHORT = (9, 8, 7, 6, 5)
BREAKS = 511  # the token whose step fails, in the tests where one does


def semi_pd(shares: tuple[float, float], **more: object):  # type: ignore[no-untyped-def]
    """It admits more than fits, so that jobs are retracted and come back."""
    prefill, decode = shares
    told = {"is_elastic": False, "init_ratio": 0.01, "clip_tokens": 1, "chunk_tokens": 64} | more
    return find("batch", "semi-pd")(prefill_share=prefill, decode_share=decode, **told)


def open_live(folder: Path, batch: object, num_blocks: int, lanes: int = 2) -> Live:
    return Live(folder, batch, "fcfs", num_blocks, evict="retract", lanes=lanes, threads=lanes)


def times_beside(live: Live) -> int:
    """Plans that began while the other lane ran."""
    flying: set[int] = set()
    found = 0
    for event in live.events:
        if isinstance(event, Stepped) and event.plan is not None:
            found += bool(flying)
            flying.add(event.plan)
        elif isinstance(event, Completed):
            flying.discard(event.plan)
    return found


def replayed(live: Live, batch: object) -> int:
    """Decisions that came out the same."""
    nobody = NoPredictions()
    policies = ReplicaPolicies(
        order=find("order", "fcfs")(),
        admit=find("admit", "watermark")(),
        batch=batch,  # type: ignore[arg-type]
        evict=find("evict", "retract")(),
        blocks=find("evict", "lru")(),
    )
    parts = ReplicaParts(
        config=live.replica.config,
        caps=live.executor.caps,
        policies=policies,
        predictors=Predictors(cost=nobody, lengths=nobody),
    )
    return replay_replica(live.events, parts, live.events[0].at).num_decisions


@pytest.mark.parametrize("shares", [*SHARES, None])
def test_text_and_logits_of_the_reference(model_root: Path, shares: str | None) -> None:
    """Also in one lane. Jobs are preempted, lanes run side by side, no block is lost, and the log replays."""
    folder, _ = saved(model_root, "llama-biased")
    split = SHARES.get(shares or "", (0.5, 0.5))

    async def main() -> tuple[Live, dict[str, list[int]]]:
        live = open_live(folder, semi_pd(split), BLOCKS, lanes=1 if shares is None else 2)
        for at, ids in enumerate(prompts()):
            live.ask(str(at), ids, sampling=LIKELY)
        return live, await live.end()

    live, texts = asyncio.run(main())
    for at, ids in enumerate(prompts()):
        text = tuple(texts[str(at)])
        logits = judged(model_root, "llama-biased", ids, text)
        assert len(text) == TOKENS
        for row, token in zip(logits, text, strict=True):
            assert row.max() - row[token] < 2 * TOLERANCE  # the best, or a tie
        for likely, told in zip(logits.log_softmax(-1), live.logprobs[str(at)], strict=True):
            for token, logprob in (told[:2], *told.top):
                assert abs(float(likely[token]) - logprob) < 2 * TOLERANCE
    ended = [event for event in live.events if isinstance(event, Finished)]
    assert sum(event.num_preemptions for event in ended) > 0
    assert (times_beside(live) > 0) == (shares is not None)
    assert live.replica.ledger.free == BLOCKS
    steps = [event for event in live.events if isinstance(event, Stepped)]
    assert replayed(live, semi_pd(split)) == len(steps)


def breaking(executor: TorchExecutor, says: Callable[[list[int]], str | None]) -> None:
    """In the middle of a forward `says` may raise, or wait; it is given the step's token ids."""
    decoder = executor._decoder

    def forward(self: Decoder, step):  # type: ignore[no-untyped-def]
        inner = Decoder.forward(decoder, step)
        for _ in range(5):
            yield next(inner)
        says(step.ids.tolist())
        return (yield from inner)

    decoder.__class__ = type("Breaking", (Decoder,), {"__slots__": (), "forward": forward})


def wait_for(is_so: Callable[[], bool]) -> None:
    """On a lane's thread."""
    until_at = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until_at, "the other lane stands still"
        time.sleep(0.001)


async def alone_text(folder: Path, ids: tuple[int, ...]) -> list[int]:
    alone = open_live(folder, semi_pd((0.5, 0.5)), 64, lanes=1)
    alone.ask("it", ids)
    return (await alone.end())["it"]


async def test_a_prompt_that_fails_or_is_cancelled_leaves_answers_alone(model_root: Path) -> None:
    """Both while the decode lane goes on."""
    folder, _ = saved(model_root, "llama-8")
    want, again = await alone_text(folder, SHORT), await alone_text(folder, LONG)
    live = open_live(folder, semi_pd((0.5, 0.5), chunk_tokens=512), 64)

    def written() -> int:
        return len(live.texts.get("stays", ()))

    def says(ids: list[int]) -> None:
        if len(ids) > 400:
            before = written()
            wait_for(lambda: written() >= before + 2)
            if BREAKS in ids:
                raise RuntimeError("it broke")

    breaking(live.executor, says)
    live.ask("stays", SHORT)
    await until(lambda: written() > 2)
    live.ask("cancelled", LONG)
    await until(lambda: live.runs_a_prompt_of(400))
    live.replica.cancel("cancelled")
    live.ask("fails", (BREAKS, *LONG[1:]))
    await until(lambda: "fails" in live.reasons)
    live.executor._decoder.__class__ = Decoder
    live.ask("again", LONG)
    got = await live.end()
    assert live.reasons == {
        "cancelled": "cancelled", "fails": "error", "stays": "length", "again": "length",
    }  # fmt: skip
    assert (got["stays"], got["again"]) == (want, again)
    assert live.replica.ledger.free == 64


async def test_answers_that_fail_or_are_cancelled_leave_a_prompt_alone(model_root: Path) -> None:
    folder, _ = saved(model_root, "llama-8")
    want = await alone_text(folder, LONG)
    live = open_live(folder, semi_pd((0.5, 0.5), chunk_tokens=512), 64)
    prompt_runs = threading.Event()

    def says(ids: list[int]) -> None:
        if len(ids) > 400:
            prompt_runs.set()
            wait_for(lambda: "fails" in live.reasons and "cancelled" in live.reasons)
        elif prompt_runs.is_set() and "fails" not in live.reasons:
            raise RuntimeError("it broke")

    breaking(live.executor, says)
    for name in ("fails", "cancelled"):
        live.ask(name, SHORT)
    await until(lambda: len(live.texts.get("cancelled", ())) > 2)
    live.replica.cancel("cancelled")
    live.ask("stays", LONG)
    got = await live.end()
    assert live.reasons["fails"] == "error" and live.reasons["cancelled"] in ("cancelled", "error")
    assert live.reasons["stays"] == "length" and got["stays"] == want
    assert live.replica.ledger.free == 64


class Drifting:
    """A limit policy that moves the shares with every question."""

    def __init__(self) -> None:
        self._shares = cycle(SHARES.values())

    def ask(self, now: float, rng: object, holders: object, supply: float) -> Mapping[str, float]:
        return dict(zip(("prefill", "decode"), next(self._shares), strict=True))

    def observe(self, event: object) -> None:
        pass


async def test_shares_that_change_hold_from_the_next_step_on(model_root: Path) -> None:
    """Threads are bound to the cores of their plan's share when it begins; the text stays."""
    folder, _ = saved(model_root, "llama-8")
    asked = [LONG[at : at + 40 + 9 * at] for at in range(6)]
    seen: list[tuple[int, float, set[int], int]] = []
    texts = []
    for lanes in (1, 2):
        batch = semi_pd((0.5, 0.5))
        batch.bind_limits(Drifting())
        live = open_live(folder, batch, 64, lanes=lanes)
        for lane in live.executor._lanes if lanes > 1 else ():
            lane._run = watched(lane._run, seen)
        for at, ids in enumerate(asked):
            live.ask(str(at), ids)
        texts.append(await live.end())
    assert texts[0] == texts[1]
    # Which lane has which share when is a matter of time.
    assert {lane for lane, *_ in seen} == {0, 1}
    assert {share for _, share, *_ in seen} == {0.5, 1.0}
    for lane, share, cores, threads in seen:
        wanted = cores_of(lane, share, cores_here(2))
        assert threads == len(wanted)
        assert not CAN_BIND or cores == set(wanted)


def watched(run, seen):  # type: ignore[no-untyped-def]
    def step(plan: Plan):  # type: ignore[no-untyped-def]
        cores = os.sched_getaffinity(0) if CAN_BIND else set()
        seen.append((plan.lane, plan.share, cores, torch.get_num_threads()))
        return (yield from run(plan))

    return step


def test_a_thread_computes_with_what_it_was_told_whatever_others_are_told_since() -> None:
    before, found = torch.get_num_threads(), []
    told, go_on = threading.Event(), threading.Event()

    def work() -> None:
        compute_with(1)
        told.set()
        go_on.wait(10)
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    assert told.wait(10)
    torch.set_num_threads(2)
    go_on.set()
    thread.join()
    torch.set_num_threads(before)
    assert found == [1]


@pytest.mark.skipif(not CAN_BIND, reason="this system binds no threads")
def test_the_whole_team_is_bound() -> None:
    """The threads that torch and the kernels compute with, not only the one that leads them."""
    cores = cores_here(2)
    found: list[set[int]] = []

    def on_team(threads: int) -> list[set[int]]:
        seen: list[set[int]] = []
        body = _Body(lambda _: seen.append(os.sched_getaffinity(0)))
        if region is not None:
            _Region(region)(body, None, threads, 0)
        return seen

    def lead() -> None:
        os.sched_setaffinity(0, cores[:1])
        assert on_team(2) == [set(cores[:1])] * (0 if region is None else 2)
        seat = Seat(0, cores)
        seat.take(1.0)
        found.extend(on_team(len(cores)))
        seat.take(0.5)
        found.append(os.sched_getaffinity(0))

    region = openmp_region()
    thread = threading.Thread(target=lead)
    thread.start()
    thread.join()
    team = [set(cores)] * (0 if region is None else len(cores))
    assert found == [*team, set(cores_of(0, 0.5, cores))]
    assert os.sched_getaffinity(0) >= set(cores), "the lead's cores are its own"


@example(15, 10, 0)
@given(st.integers(1, 70), st.integers(1, 99), st.integers(0, 99))
def test_shares_that_leave_room_never_meet_on_a_core(count: int, first: int, slack: int) -> None:
    cores = tuple(range(count))
    x = first / 100
    y = max(0.01, round(1 - x - slack / 100, 2))
    here, there = cores_of(0, x, cores), cores_of(1, y, cores)
    assert here and there and {*here, *there} <= set(cores)
    if x + y <= 1 and count > 1:
        assert not set(here) & set(there)
        if not slack:
            assert len(here) + len(there) == count
    assert cores_of(0, 1.0, cores) == cores_of(1, 1.0, cores) == cores
    assert abs(len(here) - count * x) <= 1 and abs(len(there) - count * y) <= 1


@pytest.fixture
async def executor(model_root: Path) -> AsyncIterator[TorchExecutor]:
    opened = open_executor(str(saved(model_root, "llama-8")[0]), ENGINE)
    yield opened
    await opened.stop()


Parts = Sequence[tuple[Held, int]]


def in_lane(driver: Driver, lane: int, parts: Parts) -> dict[int, Parts]:
    """Launch it; what was launched, by plan."""
    plan = driver.plan(parts)
    plan.lane = lane
    driver.executor.launch(plan)
    return {plan.id: parts}


async def all_of(driver: Driver, plans: Mapping[int, Parts]) -> None:
    """Hear of these plans, in whichever order."""
    for _ in plans:
        done = await asyncio.wait_for(driver.told.get(), 20)
        assert isinstance(done, Done) and done.error is None
        driver.apply(plans[done.plan], done)


async def test_blocks_of_an_aborted_plan_are_not_written_to_any_more(
    executor: TorchExecutor,
) -> None:
    """The other lane may have them: a plan there begins when the aborted one has left."""
    decoder = executor._decoder
    is_inside, has_others, has_written = (threading.Event() for _ in range(3))

    def attend(self: Decoder, layer: Layer, x: Tensor, step: StepInput) -> Tensor:
        is_aborted = layer is self.layers[4] and len(x) == len(LONG)
        if is_aborted:
            is_inside.set()
            has_others.wait(0.3)  # and then it writes its keys and values
        found = Decoder._attend(self, layer, x, step)
        if is_aborted:
            has_written.set()
        return found

    decoder.__class__ = type("Slow", (Decoder,), {"__slots__": (), "_attend": attend})

    driver = Driver(executor)
    scored = replace(GREEDY, logprobs=0)
    alone = driver.job(LONG[:60], scored)
    await driver.finish([alone], 6)
    aborted, other = driver.job(LONG, GREEDY), driver.job(LONG[:60], scored)
    (plan,) = in_lane(driver, 0, [(aborted, len(LONG))])
    await until(is_inside.is_set)
    executor.abort(PlanId(plan))
    blocks = set(aborted.blocks)
    driver.preempt(aborted)
    later = in_lane(driver, 1, [(other, 60)])
    assert set(other.blocks) <= blocks
    await all_of(driver, later)
    has_others.set()
    await until(has_written.is_set)
    await driver.finish([other], 6)
    pairs = zip(other.sampled, alone.sampled, strict=True)
    gaps = [abs(one.logprobs[0].logprob - two.logprobs[0].logprob) for one, two in pairs]
    assert other.outputs == alone.outputs and max(gaps) < TOLERANCE


async def test_a_table_that_grows_loses_no_token_of_the_other_lane(
    executor: TorchExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_growing, widened = threading.Event(), jobs._widened

    def slowly(array, count):  # type: ignore[no-untyped-def]
        found = widened(array, count)
        is_growing.set()
        time.sleep(0.2)
        return found

    monkeypatch.setattr(jobs, "_widened", slowly)

    driver = Driver(executor)
    short, long = driver.job(SHORT, GREEDY), driver.job(LONG, GREEDY)
    await driver.finish([short], 1)
    plans = in_lane(driver, 0, [(long, len(LONG))])
    await until(is_growing.is_set)
    plans |= in_lane(driver, 1, [(short, 1)])
    await all_of(driver, plans)
    table = executor._table
    assert table.outputs(table.jobs[short.seq]).tolist() == short.outputs
    assert len(short.outputs) == 2


def test_seeds_are_given_in_the_order_of_launches(model_root: Path) -> None:
    """Whichever lane is faster: a draw without a seed of its own is the same with one lane and with two."""
    warm = Sampling(temperature=5.0, ignore_eos=True)
    folder = str(saved(model_root, "llama-8")[0])

    async def main(lanes: int) -> list[list[int]]:
        opened = open_executor(folder, EngineConfig(**{**told, "lanes": lanes}))
        run = opened._lanes[0]._run

        def late(plan: Plan):  # type: ignore[no-untyped-def]
            time.sleep(0.1)
            return (yield from run(plan))

        if lanes > 1:
            opened._lanes[0]._run = late
        driver = Driver(opened)
        pair = [driver.job(SHORT, warm), driver.job(SHORT, warm)]
        plans = in_lane(driver, 0, [(pair[0], len(SHORT))])
        if lanes == 1:
            await all_of(driver, plans)
            plans = {}
        plans |= in_lane(driver, lanes - 1, [(pair[1], len(SHORT))])
        await all_of(driver, plans)
        await driver.finish(pair, 4)
        await opened.stop()
        return [job.outputs for job in pair]

    told = {"device": "cpu", "dtype": "fp32", "threads": 2, "num_blocks": 64}
    one, two = asyncio.run(main(1)), asyncio.run(main(2))
    assert one == two and one[0] != one[1]


@pytest.mark.parametrize(
    ("told", "says"),
    [({"lanes": 3}, "at most 2 plans"), ({"lanes": 2, "tensor_parallel": 2}, "several processes")],
)
def test_what_has_one_lane(model_root: Path, told: dict[str, int], says: str) -> None:
    folder = str(saved(model_root, "llama-8")[0])
    with pytest.raises(BadConfig, match=says):
        open_executor(folder, EngineConfig(device="cpu", num_blocks=8, **told))  # type: ignore[arg-type]


async def test_a_replica_has_the_lanes_that_its_policy_likes(model_root: Path) -> None:
    """Unless somebody says otherwise. How many there are is noted."""
    folder = str(saved(model_root, "llama-8")[0])
    for lanes, batch, wanted in ((None, "semi-pd", 2), (1, "semi-pd", 1), (None, "vllm-v1", 1)):
        spec = ReplicaSpec.from_json(
            ReplicaSpec(
                name="r", model=folder, num_blocks=8, policies={"batch": {"name": batch}}
            ).to_json()
        )
        object.__setattr__(spec.executor, "lanes", lanes)
        outside = open_torch(spec)
        caps, notes = outside.executor.caps, outside.executor.notes  # type: ignore[attr-defined]
        assert (caps.max_lanes, caps.max_total_share) == (wanted, wanted)
        assert ("lanes" in notes) == (wanted == 2)
        await outside.executor.stop()
