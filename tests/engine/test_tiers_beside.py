"""What copies to and from host memory must not do: fill it over and over, be read too early, take others' room."""

from __future__ import annotations

import asyncio

from penstock.core.events import Finished, Transferred
from penstock.core.messages import Offered
from penstock.engine.partings import Offering
from penstock.engine.swap import SwapConfig
from penstock.sim.loop import run
from tests.engine.test_tiers import World, prompt


def test_a_small_host_memory_is_not_copied_to_over_and_over() -> None:
    """It holds less than a sixteenth of the device, and the steps go on."""
    world = World(num_blocks=64, tier_blocks=3)

    async def main() -> None:
        for group in range(6):
            await world.ask(f"{group}", prompt(group, 40), 3, at=1.0 + 2 * group)
        await world.ask("long", prompt(7, 4), 40, at=14.0)
        await world.over()

    run(main())
    outward = [event for event in world.book.of(Transferred) if event.is_out]
    assert 0 < sum(event.num_blocks for event in outward) <= 20


def test_what_a_job_gets_back_is_not_offered_before_it_is_there() -> None:
    """The step waits for the copies; whoever copies ahead of a movement does not. All else is offered meanwhile."""
    world = World(num_blocks=24, swap=SwapConfig(host_blocks=64, mode="sync"))
    parts, offers = world.replica._parts, list[tuple[int, bool]]()

    def on_offered(told: Offered) -> None:
        copied = parts.copied_blocks()
        assert copied.isdisjoint(told.blocks), "they are being copied"
        offers.append((len(told.blocks), bool(copied)))

    async def main() -> None:
        for group in range(3):
            await world.ask(f"{group}", prompt(group, 40), 40, at=1.0)
        for move in range(600):
            await asyncio.sleep(0.002)
            for group in range(3):
                world.replica.move(Offering(move, f"{group}", False, on_offered))
        await world.over()

    run(main())
    back = [one for one in world.book.of(Transferred) if not one.is_out and one.seq is not None]
    assert back and (0, True) in offers
    assert any(size > 5 for size, is_copying in offers if is_copying)


def test_nothing_is_brought_for_a_prompt_that_has_no_room_beside_who_runs() -> None:
    """It has six blocks here that nobody holds, four of ten free ones are another's, and it needs eleven."""
    world = World()

    async def main() -> None:
        await world.ask("begun", prompt(0, 40), 1, at=1.0)
        await world.ask("another", prompt(2, 16), 1, at=2.0)
        await world.ask("long", prompt(1, 50), 20, at=3.0)
        await world.ask("waits", prompt(0, 40), 1, at=3.1)
        await world.over()

    run(main())
    (ended,) = [one.at for one in world.book.of(Finished) if one.request == "long"]
    back = [event.at for event in world.book.of(Transferred) if not event.is_out]
    assert back and min(back) >= ended and world.cached()["waits"] == 40
