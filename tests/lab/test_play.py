"""Playing a trace on a service in virtual time: open loop, counted refusals, bugs that are not swallowed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.core.clock import now
from penstock.core.errors import Overloaded
from penstock.core.ports import OnEnded, OnOutput
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Report, Request, RequestId
from penstock.lab.play import Played, play
from penstock.sim.loop import run
from penstock.traffic import open_trace

AZURE = Path(__file__).parents[2] / "data" / "azure_2023_conv_200.csv"


class Slow:
    """Takes `each_s` for every request, any number at once; refuses and fails those it is told to."""

    def __init__(self, each_s: float, refused: frozenset[str] = frozenset(), bug: str = "") -> None:
        self.each_s, self.refused, self.bug = each_s, refused, bug
        self.arrivals: list[tuple[str, float]] = []
        self.num_open = self.most_open = self.num_cancelled = 0

    def models(self) -> list[str]:
        return ["default"]

    def reports(self) -> list[Report]:
        return []

    async def drain(self) -> None: ...

    def start(
        self, request: Request, on_ended: OnEnded, on_output: OnOutput | None = None
    ) -> asyncio.Task[None]:
        async def serve() -> None:
            try:
                await self.submit(request)
            except Exception as error:  # noqa: BLE001 - whatever it is, the player is to hear it
                on_ended(error)
            else:
                on_ended(None)

        return asyncio.get_running_loop().create_task(serve())

    async def submit(self, request: Request, on_output: OnOutput | None = None) -> None:
        self.arrivals.append((request.id, now()))
        if request.id in self.refused:
            raise Overloaded("no room")
        if request.id == self.bug:
            raise RuntimeError("a bug")
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await asyncio.sleep(self.each_s)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_open -= 1


def evenly(num: int, gap_s: float) -> Iterator[tuple[float, Request]]:
    for number in range(num):
        request = Request(id=RequestId(f"r{number}"), model="default", prompt=TracedPrompt(5))
        yield number * gap_s, request


def test_requests_arrive_at_their_instants_whatever_is_under_way() -> None:
    service, trace = Slow(1000.0), open_trace(AZURE)
    played = run(play(trace, service), start_at=50.0)
    assert [request.id for _, request in trace] == [name for name, _ in service.arrivals]
    assert [50.0 + at_s for at_s, _ in trace] == pytest.approx([at for _, at in service.arrivals])
    assert service.most_open == 200 == played.num_served == played.num_sent
    assert played.max_lateness_s < 1e-9
    assert played.ended_at == pytest.approx(service.arrivals[-1][1] + 1000.0)


def test_refusals_are_counted_by_kind() -> None:
    service = Slow(1.0, frozenset({"r1", "r3"}))
    seen: list[int] = []
    played = run(play(evenly(5, 0.1), service, on_progress=lambda now: seen.append(now.num_sent)))
    assert (played.num_sent, played.num_served, played.errors) == (5, 3, {"Overloaded": 2})
    assert seen == [1, 2, 3, 4, 5]


def test_a_bug_ends_the_play() -> None:
    service = Slow(10.0, bug="r2")
    with pytest.raises(RuntimeError, match="a bug"):
        run(play(evenly(1000, 1.0), service))
    assert len(service.arrivals) <= 4 and service.num_open == 0


def test_cancelling_a_play_cancels_its_requests() -> None:
    service = Slow(100.0)

    async def main() -> None:
        task = asyncio.create_task(play(evenly(10, 1.0), service))
        await asyncio.sleep(4.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)

    run(main())
    assert service.num_cancelled == 5 and service.num_open == 0


def test_ten_thousand_at_once_are_cheap() -> None:
    played: Played = run(play(evenly(10_000, 0.01), Slow(30.0)))
    assert played.num_served == 10_000
