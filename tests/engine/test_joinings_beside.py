"""A request that moves in waits for copies of the blocks that it gets, and for no others."""

from __future__ import annotations

import asyncio

import pytest

from penstock.core.moving import JobState
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Request, RequestId, Sampling
from penstock.engine.joinings import Landing, OnGranted, Pairs, Taking
from penstock.engine.partings import Settling
from penstock.sim.loop import run
from tests.engine.test_tiers import SIZE, World, prompt


def taking(num_blocks: int, on_granted: OnGranted) -> Taking:
    tokens = num_blocks * SIZE
    request = Request(
        id=RequestId("comes"),
        model="m",
        prompt=TokenPrompt([9 + at for at in range(tokens)]),
        sampling=Sampling(max_tokens=8),
    )
    state = JobState(num_output=1, output_ids=(5,), computed=tokens)
    blocks = tuple(range(num_blocks))
    return Taking(7, "comes", state, True, False, request, blocks, on_granted)


@pytest.mark.parametrize("wants", ["few", "all"])
def test_only_copies_of_its_own_blocks_are_waited_for(wants: str) -> None:
    world = World(num_blocks=64)
    granted: list[tuple[Pairs | str, set[int]]] = []

    async def main() -> None:
        replica = world.replica
        for group in range(6):  # 12 blocks each: the last one finds the device full
            await world.ask(f"{group}", prompt(group, 44), 3, at=1.0 + group)
        while not replica._parts.copied_blocks():
            await asyncio.sleep(0.0002)
        num_blocks = 2 if wants == "few" else replica.ledger.free - 2

        def on_granted(told: Pairs | str) -> None:
            granted.append((told, replica._parts.copied_blocks()))

        replica.move(taking(num_blocks, on_granted))
        await asyncio.sleep(1.0)
        replica.move(Landing(7, None, lambda: None))
        replica.move(Settling(7, "comes", "drop"))
        await world.over()

    run(main())
    ((pairs, copied),) = granted
    assert not isinstance(pairs, str)
    places = {first + at for _, first, count in pairs for at in range(count)}
    assert copied.isdisjoint(places)
    if wants == "few":
        assert copied, "others were being copied all the while"
