"""A move policy that fails harms nobody: not who is asked about, nor those whose tokens come in the same message."""

from __future__ import annotations

import asyncio
from typing import Any

from penstock.policy import move
from penstock.sim.loop import run
from tests.cluster.moving_world import World


class Failing:
    """Asked at first tokens, and never has an answer."""

    causes = frozenset({"prefilled"})
    every_s = None

    def __init__(self) -> None:
        self.num_asked = 0

    def decide(self, view: move.View) -> move.Decision:
        self.num_asked += 1
        raise ValueError("no idea")


def test_one_that_fails_at_a_first_token_takes_no_tokens_from_anybody(caplog: Any) -> None:
    async def main() -> None:
        mover = Failing()
        world = World(1, mover=mover)
        await world.start()
        for name in "abc":
            world.ask(name, [1, 2, 3], 12)
        async with asyncio.timeout(200):
            await world.end()
        assert mover.num_asked == 3
        assert [len(asked.ids) for asked in world.asked.values()] == [12] * 3
        world.check_texts()
        await world.stop()

    run(main())
    assert "the move policy of m failed" in caplog.text
