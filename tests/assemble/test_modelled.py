"""A whole deployment on modelled leaves: two fleets, in virtual time, the same log twice."""

from __future__ import annotations

import asyncio

import pytest

from penstock.assemble import Config, assemble, load_config, modelled_leaves, replica_specs
from penstock.assemble.leaves import modelled_outside
from penstock.core.errors import BadConfig, ReplicaLost, UnknownModel
from penstock.core.events import Finished, Opened, Routed
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Request, RequestId, Sampling
from penstock.report.log import Digest, Memory
from penstock.sim.channel import Link
from penstock.sim.loop import run
from penstock.sim.transport import Fabric

SETS = (
    "fleet.0.model=llama-3.1-8b",
    "fleet.0.name=big",
    'fleet.0.aliases=["large"]',
    "fleet.0.executor.gpu=a100-80g",
    "fleet.0.replicas=3",
    "net.latency_s=0.001",
)


def config(*more: str) -> Config:
    return load_config(sets=(*SETS, *more))


def requests(count: int) -> list[tuple[float, Request]]:
    draw, at, made = stream(3, "test"), 0.0, []
    for number in range(count):
        at += draw.expovariate(20.0)
        made.append(
            (
                at,
                Request(
                    id=RequestId(f"r{number}"),
                    model=draw.choice(["big", "large"]),
                    prompt=TracedPrompt(1000, (draw.randrange(4), number + 100)),
                    sampling=Sampling(max_tokens=64),
                    true_output=draw.randrange(1, 64),
                ),
            )
        )
    return made


async def play(config: Config, count: int) -> Memory:
    log = Memory()
    service = await assemble(config, modelled_leaves(config, log))
    assert service.models() == ["big", "large"]

    async def one(at: float, request: Request) -> None:
        await asyncio.sleep(at)
        await service.submit(request)

    await asyncio.gather(*(one(at, request) for at, request in requests(count)))
    await service.drain()
    await service.stop()
    return log


def digest(log: Memory) -> str:
    sink = Digest()
    for event in log.events:
        sink.emit(event)
    return sink.hexdigest()


def test_every_request_ends_once_and_the_same_seed_gives_the_same_log() -> None:
    first, second = (run(play(config(), 150)) for _ in range(2))
    assert digest(first) == digest(second)
    finished = [event for event in first.events if isinstance(event, Finished)]
    assert len({event.request for event in finished}) == len(finished) == 150
    wanted = {request.id: request.true_output for _, request in requests(150)}
    assert {event.request: event.num_output for event in finished} == wanted
    assert {event.who for event in finished} == {"big-0", "big-1", "big-2"}
    assert sum(isinstance(event, Routed) for event in first.events) == 150
    assert [event.what for event in first.events if isinstance(event, Opened)].count("replica") == 3
    assert any(event.num_cached for event in finished)


def test_policies_matter_and_seeds_are_kept() -> None:
    assert digest(run(play(config(), 60))) != digest(
        run(play(config("fleet.0.policy.route=round-robin"), 60))
    )


def test_a_modelled_replica_needs_something_to_take_its_times_from() -> None:
    with pytest.raises(BadConfig, match="gpu"):
        run(play(load_config(sets=SETS[:2]), 1))


def test_unknown_models_are_told_the_known_ones() -> None:
    async def body() -> None:
        service = await assemble(config(), modelled_leaves(config(), Memory()))
        with pytest.raises(UnknownModel) as caught:
            await service.submit(Request(id=RequestId("a"), model="huge", prompt=TracedPrompt(9)))
        assert "big, large" in caught.value.hint
        await service.stop()

    run(body())


def test_a_successor_is_not_read_in_place_of_the_one_that_was_lost() -> None:
    """A copy that waits for room may begin when its source was started again: what is there now is not what was."""

    async def main() -> None:
        spec, fabric = replica_specs(config(), 0)[0], Fabric(Link())
        first, reader = (modelled_outside(spec, Memory(), fabric=fabric).transport for _ in "ab")
        assert first is not None and reader is not None
        await reader.pull(first.card.address, ((0, 0, 1),))
        await first.close()
        modelled_outside(spec, Memory(), fabric=fabric)
        with pytest.raises(ReplicaLost):
            await reader.pull(first.card.address, ((0, 0, 1),))

    run(main())
