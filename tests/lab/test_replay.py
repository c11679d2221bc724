"""Replays of replicas and fleets: identical when nothing changed, and a difference found where it is.

Logs are written by real replicas in virtual time (modelled executor) and under the wall clock (an executor whose
steps take uneven real time), by files and by memory.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs

from penstock.cluster.router import Router
from penstock.cluster.spec import ReplicaSpec, policy_of
from penstock.core.clock import now, sleep_until
from penstock.core.config import Table
from penstock.core.errors import BadTrace
from penstock.core.events import (
    Arrived,
    Completed,
    Event,
    Finished,
    Header,
    Opened,
    Routed,
    Stepped,
)
from penstock.core.plans import Done, Plan, Sampled
from penstock.core.ports import Completion
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Caps, PlanId, Report, Request, RequestId, Sampling, Slo
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.lab.judge import Diverged
from penstock.lab.replay import (
    ReplicaParts,
    parts_of,
    replay,
    replay_fleet,
    replay_log,
    replay_replica,
)
from penstock.report.log import LogWriter, Memory
from penstock.report.made import MadeFleet, MadeReplica, opened
from penstock.sim.loop import run

POLICIES: dict[str, dict[str, object]] = {
    "order": {"name": "fcfs"},
    "admit": {"name": "watermark"},
    "batch": {"name": "vllm-v1", "max_tokens": 64},
    "evict": {"name": "recompute-last"},
    "blocks": {"name": "lru"},
}
CAPS = Caps(num_layers=32, max_context=2048, max_jobs=16, max_batch_tokens=512, max_repeat=64)


def made(num_blocks: int = 40, caps: Caps = CAPS, **policies: dict[str, object]) -> MadeReplica:
    tables = {slot: Table(table) for slot, table in (POLICIES | policies).items()}
    spec = ReplicaSpec(name="replica-0", model="llama-3.1-8b", seed=5, policies=tables)
    table = json.loads(spec.to_json())
    table["executor"] |= {"kind": "modelled", "gpu": "a100-80g"}
    return MadeReplica(
        spec={name: value for name, value in table.items() if value is not None},
        num_blocks=num_blocks,
        caps=caps,
    )


class UnevenExecutor:
    """Runs under any clock: steps take 0.2 to 3 ms, now and then two completions fall on one turn of the loop."""

    def __init__(self, caps: Caps, seed: int) -> None:
        self.caps = caps
        self.left: dict[int, int] = {}
        self.chance = random.Random(seed)

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        self.on_completion = on_completion

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        for seq, request, *_ in plan.opened:
            self.left.setdefault(seq, request.true_output or 1 << 30)
        asyncio.get_running_loop().call_later(self.chance.uniform(2e-4, 3e-3), self.end, plan)
        return plan.id

    def end(self, plan: Plan) -> None:
        outputs = []
        for work in plan.work:
            if not work.samples:
                continue
            self.left[work.seq] -= 1
            error = "it broke" if self.chance.random() < 0.002 else None
            outputs.append(Sampled(work.seq, 1, is_stop=self.left[work.seq] <= 0, error=error))
        self.on_completion(Done(plan.id, 1, tuple(outputs), (now(),)))

    def interrupt(self, plan: PlanId, grain: str = "step") -> None: ...

    def resume(self, plan: PlanId) -> None: ...

    def abort(self, plan: PlanId) -> None: ...

    def close_jobs(self, seqs: object) -> None: ...

    async def stop(self) -> None: ...


async def workload(replica: Replica, seed: int, num: int, gap_s: float) -> None:
    """Arrivals (some of the same instant, some with shared prefixes, some with several answers) and cancels."""
    chance = random.Random(seed)
    at = now()
    for number in range(num):
        at += chance.choice((0.0, 0.0, chance.expovariate(1 / gap_s)))
        await sleep_until(at)
        tokens = chance.randrange(1, 200)
        ids = tuple(range(-(-tokens // 512))) if chance.random() < 0.5 else ()
        replica.submit(
            Request(
                id=RequestId(f"r{number}"),
                model="m",
                prompt=TracedPrompt(tokens, ids),
                sampling=Sampling(
                    max_tokens=chance.randrange(1, 60),
                    prompt_logprobs=0 if number % 5 == 0 else None,
                ),
                true_output=chance.randrange(1, 60),
                n=chance.choice((1, 1, 1, 2)),
                priority=chance.randrange(3),
                slo=Slo(ttft_s=chance.uniform(0.1, 1)),
            )
        )
        if chance.random() < 0.15:
            replica.cancel(f"r{chance.randrange(number + 1)}")


def parts(record: MadeReplica) -> ReplicaParts:
    return parts_of(record)


async def write(
    record: MadeReplica, log: object, seed: int, executor: object, **load: float
) -> None:
    of = parts(record)
    replica = Replica(of.config, executor, of.policies, of.predictors, log=log)  # type: ignore[arg-type]
    log.emit(opened(now(), "replica-0", record))  # type: ignore[attr-defined]
    running = asyncio.get_running_loop().create_task(replica.run())
    await workload(replica, seed, **load)  # type: ignore[arg-type]
    await replica.drain()
    await replica.stop()
    await running


def modelled(record: MadeReplica) -> object:
    from penstock.cost.hardware import card_of
    from penstock.cost.roofline import Roofline
    from penstock.cost.shapes import shape_of
    from penstock.sim.executor import ModelledExecutor

    return ModelledExecutor(
        Roofline(shape_of("llama-3.1-8b"), card_of("a100-80g")), caps=record.caps
    )


def virtual_log(seed: int, record: MadeReplica, start_at: float = 0.0) -> list[Event]:
    memory = Memory()
    run(write(record, memory, seed, modelled(record), num=80, gap_s=0.02), start_at=start_at)
    return memory.events


VARIANTS = {
    "roomy": made(400),
    "tight": made(40),
    "prefill-first": made(60, batch={"name": "sglang"}, evict={"name": "retract"}),
    "deadlines": made(60, order={"name": "slack-edf"}),
    "priorities": made(60, order={"name": "priority"}, evict={"name": "recompute-priority"}),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_virtual_runs_replay_identically(name: str, seed: int) -> None:
    record = VARIANTS[name]
    log = virtual_log(seed, record)
    judge = replay_replica(log, parts(record))
    steps = [event for event in log if isinstance(event, Stepped)]
    assert judge.num_decisions == len(steps) > 50
    assert judge.num_events == len(
        [event for event in log if event.kind not in ("opened", "refused")]
    )
    if name == "tight":
        assert any(event.evicted for event in steps)
    if name == "roomy":
        assert any(isinstance(event, Completed) and event.steps_run > 1 for event in log)


@pytest.mark.parametrize("seed", range(3))
async def test_wall_clock_runs_replay_identically(seed: int, tmp_path: Path) -> None:
    """Under a loaded machine the instants are anybody's guess; the decisions taken at them are not."""
    record = made(30, dataclasses.replace(CAPS, max_repeat=1))
    log = LogWriter(tmp_path / "replica-0.jsonl")
    log.emit(Header(who="replica-0", loop_at=now()))
    executor = UnevenExecutor(record.caps, seed)
    await write(record, log, seed, executor, num=60, gap_s=0.004)
    log.close()
    (outcome,) = await asyncio.to_thread(replay, tmp_path)
    assert outcome.difference is None, str(outcome.difference)
    assert outcome.num_decisions > 100


def changed(log: list[Event], place: int, **values: object) -> list[Event]:
    return [*log[:place], structs.replace(log[place], **values), *log[place + 1 :]]


def first(log: list[Event], kind: type, after: int = 0) -> int:
    return next(i for i, event in enumerate(log) if i >= after and isinstance(event, kind))


def test_logs_that_spell_out_the_hashes_of_a_trace_replay_too() -> None:
    """As they were written before a trace's prompt was logged by the ids of its runs."""
    record = VARIANTS["tight"]
    log = virtual_log(3, record)
    old: list[Event] = []
    for event in log:
        if isinstance(event, Arrived) and event.hash_ids:
            prompt = TracedPrompt(event.num_prompt, event.hash_ids)
            spelt = tuple(each.hex() for each in prompt.blocks(16))
            event = structs.replace(event, hashes=spelt, hash_ids=(), traced_size=None)
        old.append(event)
    assert old != log
    judge = replay_replica(old, parts(record))
    assert judge.num_events == len(old) - 1  # all but the record of how it was made


def test_a_changed_decision_is_found_where_it_is() -> None:
    record = VARIANTS["tight"]
    log = virtual_log(0, record)
    place = first(log, Stepped, len(log) // 2)
    number = sum(isinstance(event, Stepped) for event in log[:place]) + 1
    with pytest.raises(Diverged) as caught:
        replay_replica(changed(log, place, digest="0" * 32), parts(record))
    found = caught.value.difference
    assert (found.number, found.fields) == (number, ("digest",))
    assert found.recorded == structs.replace(log[place], digest="0" * 32)
    assert found.replayed == log[place]
    told = str(found)
    assert f"decision {number} differs" in told and "digest" in told and "num_waiting" in told


def test_other_policies_and_other_sizes_decide_otherwise() -> None:
    log = virtual_log(0, VARIANTS["tight"])
    for other in (
        made(39),
        made(40, batch={"name": "sglang"}),
        made(40, order={"name": "priority"}),
    ):
        with pytest.raises(Diverged):
            replay_replica(log, parts(other))


@pytest.mark.parametrize("kind", [Stepped, Completed, Finished])
def test_a_missing_record_is_found(kind: type) -> None:
    record = VARIANTS["roomy"]
    log = virtual_log(1, record)
    place = first(log, kind, len(log) // 2)
    with pytest.raises(Diverged):
        replay_replica([*log[:place], *log[place + 1 :]], parts(record))


def test_a_decision_too_many_is_found() -> None:
    record = VARIANTS["roomy"]
    log = virtual_log(1, record)
    place = first(log, Stepped, len(log) // 2)
    with pytest.raises(Diverged) as caught:
        replay_replica([*log[: place + 1], log[place], *log[place + 1 :]], parts(record))
    assert caught.value.difference.replayed is None


def test_a_log_cut_anywhere_replays_up_to_there() -> None:
    record = VARIANTS["tight"]
    log = virtual_log(3, record)
    for end in random.Random(0).sample(range(2, len(log)), 12):
        steps = sum(isinstance(event, Stepped) for event in log[:end])
        assert replay_replica(log[:end], parts(record)).num_decisions == steps


def test_a_clock_that_began_late_is_exact() -> None:
    record = VARIANTS["tight"]
    log = virtual_log(2, record, start_at=123456.789)
    assert replay_replica(log, parts(record), 123456.789).num_decisions > 50


def route_log(policy: str, seed: int = 0) -> list[Event]:
    """A router under random reports, retries, refusals and cancels."""
    memory, chance = Memory(), random.Random(seed)
    memory.emit(opened(0.0, "fleet-m", MadeFleet(route={"name": policy}, seed=seed)))
    table = Table({"name": policy})
    router = Router("fleet-m", policy_of("route", table, "policy"), log=memory, seed=seed)  # type: ignore[arg-type]
    names = [f"replica-{i}" for i in range(4)]
    for name in names:
        router.hear(0.0, Report(replica=name, at=0.0, max_context=4096))
    open_at: list[tuple[str, str]] = []
    for number in range(200):
        at = number * 0.1
        name = chance.choice(names)
        router.hear(
            at,
            Report(replica=name, at=at - 0.01, num_waiting=chance.randrange(9), max_context=4096),
        )
        ids = (chance.randrange(3), 100 + number)
        request = Request(id=RequestId(f"r{number}"), model="m", prompt=TracedPrompt(700, ids))
        router.arrive(at, request)
        chosen = router.choose(at, request)
        assert chosen is not None
        if chance.random() < 0.2:
            router.end(at + 0.01, request.id, chosen)
            chosen = router.choose(at + 0.01, request, (chosen,))
            assert chosen is not None
        if chance.random() < 0.1:
            router.end(at + 0.02, request.id, chosen)
            router.refuse(at + 0.02, request.id, "StepFailed", "it broke")
            continue
        open_at.append((request.id, chosen))
        if chance.random() < 0.1:
            router.cancel(at + 0.03, request.id)
        if chance.random() < 0.7:
            router.end(at + 0.04, *open_at.pop(chance.randrange(len(open_at))))
    return memory.events


@pytest.mark.parametrize("policy", ["round-robin", "least", "p2c", "prefix"])
def test_routing_replays_identically(policy: str) -> None:
    log = route_log(policy)
    judge = replay_fleet(log, "fleet-m", MadeFleet(route={"name": policy}))
    assert judge.num_decisions == sum(isinstance(event, Routed) for event in log) > 200
    other = MadeFleet(route={"name": "least" if policy != "least" else "round-robin"})
    with pytest.raises(Diverged):
        replay_fleet(log, "fleet-m", other)


def test_a_file_of_a_fleet_and_its_replica(tmp_path: Path) -> None:
    """One file may hold several mechanisms, as a simulation writes it."""
    record = VARIANTS["tight"]
    log = LogWriter(tmp_path / "all.jsonl")
    log.emit(Header(who="all"))
    for event in sorted([*virtual_log(0, record), *route_log("p2c")], key=lambda event: event.at):  # type: ignore[union-attr]
        log.emit(event)
    log.close()
    outcomes = replay_log(tmp_path / "all.jsonl")
    assert [outcome.what for outcome in outcomes] in (["replica", "fleet"], ["fleet", "replica"])
    assert all(outcome.difference is None and outcome.num_decisions for outcome in outcomes)


def test_what_cannot_be_replayed_is_said(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a.jsonl")
    log.emit(Header(who="x"))
    log.close()
    with pytest.raises(BadTrace, match="does not say how"):
        replay(tmp_path / "a.jsonl")
    log = LogWriter(tmp_path / "b.jsonl")
    log.emit(Header(who="x"))
    log.emit(Opened(at=0.0, who="x", what="replica", made="{}"))
    log.close()
    with pytest.raises(BadTrace, match="how x was made"):
        replay(tmp_path / "b.jsonl")
    with pytest.raises(BadTrace, match="cannot be made again"):
        parts_of(made(order={"name": "astrology"}))


def test_the_config_is_not_bounded_by_its_queue() -> None:
    assert parts(made()).config == ReplicaConfig(name="replica-0", num_blocks=40, seed=5)
