"""Jobs of adapters in a replica: who waits for which, what a step holds, and that a log of it replays."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from dataclasses import replace

import pytest

from penstock.core.clock import now
from penstock.core.events import AdapterLoaded, Arrived, Event, Finished, Stepped
from penstock.core.plans import Adapted
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Caps, Output, Request, RequestId, Sampling
from penstock.engine.replica import Replica
from penstock.lab.replay import replay_replica
from penstock.report.log import Memory
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run
from tests.engine.test_swap import MODEL
from tests.lab.test_replay import made, parts, workload

CAPS = Caps(num_layers=32, max_context=2048, max_repeat=64, max_adapters=2)


class Faulty(ModelledExecutor):
    """Cannot load the adapter "broken"."""

    def _adapted(self, adapter: str, slot: int, end: float) -> None:
        if adapter != "broken":
            return super()._adapted(adapter, slot, end)
        del self._loading[slot]
        assert self._tell is not None
        self._tell(Adapted(adapter, slot, end, "it is broken"))


class Adapting:
    """Gives the requests of a workload adapters."""

    def __init__(self, replica: Replica, seed: int) -> None:
        self.replica, self.chance = replica, random.Random(seed)
        self.cancel = replica.cancel

    def submit(self, request: Request) -> None:
        adapter = self.chance.choice((None, "a", "b", "c", "d", "broken"))
        self.replica.submit(dataclasses.replace(request, adapter=adapter))


def recorded(
    seed: int, *, load_s: float = 0.03, num_blocks: int = 30
) -> tuple[object, list[Event]]:
    record, log = made(num_blocks, CAPS), Memory()
    record.spec["max_adapters"] = CAPS.max_adapters

    async def main() -> None:
        found = parts(record)
        executor = Faulty(MODEL, caps=CAPS)
        executor.adapter_load_s = load_s
        config = replace(found.config, is_checked=True)
        replica = Replica(config, executor, found.policies, found.predictors, log=log)
        ended = asyncio.get_running_loop().create_task(replica.run())
        await workload(Adapting(replica, seed), seed, 60, 0.05)  # type: ignore[arg-type]
        await replica.drain()
        await replica.stop()
        await ended

    run(main())
    return record, log.events


@pytest.mark.parametrize("seed", range(4))
def test_every_step_holds_resident_adapters_only(seed: int) -> None:
    """Under preemption, cancels, several answers and an adapter that cannot be loaded; and all answers end."""
    _, events = recorded(seed, load_s=0.0 if seed % 2 else 0.03)
    adapter_of: dict[int, str | None] = {}
    slots: dict[int, str] = {}
    wanted = answered = 0
    for event in events:
        if isinstance(event, Arrived):
            wanted += event.n
            adapter_of.update(dict.fromkeys(range(event.seq, event.seq + event.n), event.adapter))
        elif isinstance(event, AdapterLoaded) and event.error is None:
            slots[event.slot] = event.adapter
        elif isinstance(event, Stepped):
            used = {adapter_of[seq] for seq, _ in event.chunks} - {None}
            assert used <= set(slots.values())
        elif isinstance(event, Finished):
            answered += 1
            is_broken = event.reason == "error"
            assert not is_broken or event.num_output == 0
    assert wanted == answered
    assert len(slots) == CAPS.max_adapters
    assert any(isinstance(event, Finished) and event.reason == "error" for event in events)
    assert sum(isinstance(event, Finished) and event.num_preemptions > 0 for event in events)


@pytest.mark.parametrize("seed", range(3))
def test_replayed_identically(seed: int) -> None:
    record, events = recorded(seed, load_s=0.0 if seed == 2 else 0.03)
    judge = replay_replica(events, parts(record))  # type: ignore[arg-type]
    assert judge.num_decisions == sum(isinstance(event, Stepped) for event in events) > 50


def request(name: str, adapter: str | None, tokens: int = 8) -> Request:
    return Request(
        id=RequestId(name),
        model="m",
        prompt=TracedPrompt(16),
        sampling=Sampling(max_tokens=tokens),
        true_output=tokens,
        adapter=adapter,
    )


class One:
    """A replica with one slot, and when each answer ended."""

    def __init__(self, load_s: float = 0.01) -> None:
        record = made(200, replace(CAPS, max_adapters=1))
        found = parts(record)
        executor = Faulty(MODEL, caps=record.caps)
        executor.adapter_load_s = load_s
        self.ended: dict[str, tuple[float, Output]] = {}
        config = replace(found.config, is_checked=True)
        self.replica = Replica(
            config, executor, found.policies, found.predictors, log=Memory(), on_outputs=self.hear
        )
        self.running = asyncio.get_running_loop().create_task(self.replica.run())

    def hear(self, items: tuple[tuple[str, Output], ...]) -> None:
        for name, output in items:
            if output.finish is not None:
                self.ended[name] = now(), output

    async def close(self) -> None:
        await self.replica.drain()
        await self.replica.stop()
        await self.running


def test_a_stream_of_one_adapters_jobs_does_not_shut_the_others_out() -> None:
    async def main() -> None:
        one = One()
        for number in range(200):
            one.replica.submit(request(f"a{number}", "a", 40))
            if number == 20:
                one.replica.submit(request("b", "b"))
            await asyncio.sleep(0.01)
        await one.close()
        taken_before = one.ended["a20"][0]
        ended_at = one.ended["b"][0]
        assert taken_before < ended_at < one.ended["a22"][0]  # those behind it wait for it
        assert one.replica.report().adapters == (("a",), 3, 2)

    run(main())


def test_the_base_and_residents_run_while_an_adapter_loads() -> None:
    async def main() -> None:
        one = One(load_s=5.0)
        one.replica.submit(request("a", "a"))
        one.replica.submit(request("base", None))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert one.replica.report().num_waiting >= 1
        await one.close()
        assert one.ended["base"][0] < 1 < 5 < one.ended["a"][0]

    run(main())


def test_a_cancelled_job_needs_no_adapter_and_a_broken_one_ends_its_jobs() -> None:
    async def main() -> None:
        one = One()
        one.replica.submit(request("a", "a", 400))
        await asyncio.sleep(0.1)
        one.replica.submit(request("gone", "b"))
        one.replica.submit(request("more", "a"))  # waits behind b
        await asyncio.sleep(0.1)
        one.replica.cancel("gone")
        await asyncio.sleep(0.3)
        assert one.ended["gone"][1].finish == "cancelled" and "more" in one.ended
        one.replica.submit(request("x", "broken"))
        await one.close()
        assert one.ended["x"][1].error == "it is broken" and one.ended["x"][1].code == "BadRequest"
        assert one.ended["a"][1].finish == "stop"
        assert one.replica.is_idle

    run(main())
