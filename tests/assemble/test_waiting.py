"""While engines load, people are told which are still at it; in virtual time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

pytest.importorskip("huggingface_hub", reason="the extra `engine` is not installed")

from penstock.assemble.serving import STILL_S, Waiting  # noqa: E402
from penstock.cluster.process import Processes  # noqa: E402
from penstock.sim.loop import run  # noqa: E402


def engine(name: str, is_alive: bool) -> SimpleNamespace:
    return SimpleNamespace(spec=SimpleNamespace(name=name), link=SimpleNamespace(is_alive=is_alive))


def test_engines_that_still_load_are_named_now_and_then() -> None:
    told: list[str] = []
    processes = SimpleNamespace(engines=[engine("a-0", True), engine("a-1", False)])

    async def load() -> None:
        with Waiting(cast(Processes, processes), told.append):
            await asyncio.sleep(2.5 * STILL_S)
        await asyncio.sleep(10 * STILL_S)

    run(load())
    assert told == [f"still loading after {STILL_S * i:g} s: a-1" for i in (1, 2)]
