"""A replica that says nothing is suspect, then lost; one that speaks again is neither."""

from __future__ import annotations

import asyncio

import pytest

from penstock.cluster.silence import Patience, Silence
from penstock.core.clock import now
from penstock.sim.loop import run

PATIENCE = Patience(suspect_after_s=3.0, lost_after_s=10.0)


class Heard:
    def __init__(self) -> None:
        self.told: list[tuple[float, object]] = []
        self.silence = Silence(PATIENCE, on_suspect=self._hear, on_lost=self._hear)

    def _hear(self, told: object) -> None:
        self.told.append((now(), told))


def test_silence_is_suspected_and_then_given_up() -> None:
    async def main() -> list[tuple[float, object]]:
        heard = Heard()
        heard.silence.begin()
        await asyncio.sleep(60.0)
        return heard.told

    begun, lost = run(main())
    assert begun == (4.0, True)
    assert lost == (11.0, "it said nothing for 10 s")


def test_a_word_clears_it() -> None:
    async def main() -> list[tuple[float, object]]:
        heard = Heard()
        heard.silence.begin()
        for wait_s in (2.9, 2.9, 4.5, 9.9):
            await asyncio.sleep(wait_s)
            heard.silence.hear()
        heard.silence.end()
        await asyncio.sleep(60.0)
        return heard.told

    told = run(main())
    assert [what for _, what in told] == [True, False, True, False]


@pytest.mark.parametrize("suspect, lost", [(0.0, 5.0), (5.0, 5.0), (3.0, float("inf"))])
def test_patience_has_an_order(suspect: float, lost: float) -> None:
    with pytest.raises(ValueError, match="suspect before"):
        Patience(suspect_after_s=suspect, lost_after_s=lost)
