"""A replica that does what a test tells it: a core.ports.ReplicaPort without anything behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from msgspec import UNSET

from penstock.core.clock import now
from penstock.core.errors import PenstockError, ReplicaLost
from penstock.core.messages import Submit
from penstock.core.ports import OnFailed, OnOutput
from penstock.core.types import Output, Report, Request


@dataclass
class Held:
    request: Request
    on_output: OnOutput
    on_failed: OnFailed
    every_token: bool
    left: list[int]
    is_cancelled: bool = False


class NullReplica:
    def __init__(self, name: str) -> None:
        self.name = name
        self.held: dict[str, Held] = {}
        self.seen: list[str] = []
        self.is_alive = True
        self.is_stopped = False
        self.is_suspect = False
        self._on_report: Callable[[Report], None] = lambda report: None

    def say(self) -> None:
        self._on_report(
            Report(
                replica=self.name,
                at=now(),
                is_alive=self.is_alive,
                num_running=len(self.held),
                is_suspect=self.is_suspect or UNSET,
            )
        )

    def submit(self, asked: Submit, on_output: OnOutput, on_failed: OnFailed) -> None:
        request = asked.request
        assert request.id not in self.held
        self.seen.append(request.id)
        if not self.is_alive:
            asyncio.get_running_loop().call_soon(on_failed, ReplicaLost("not running"))
            return
        self.held[request.id] = Held(
            request, on_output, on_failed, asked.every_token, list(range(request.n))
        )

    def cancel(self, request_id: str) -> None:
        if request_id in self.held:
            self.held[request_id].is_cancelled = True

    def listen(self, on_report: Callable[[Report], None]) -> None:
        self._on_report = on_report

    async def drain(self) -> None: ...

    async def stop(self) -> None:
        self.is_stopped = True
        self.lose()

    # what a test makes it do

    def token(self, request_id: str) -> None:
        held = self.held[request_id]
        if held.every_token:
            held.on_output(Output(held.left[0], (7,), 1))

    def end(self, request_id: str, reason: str = "stop", error: str | None = None) -> None:
        """End the next open answer."""
        held = self.held[request_id]
        answer = held.left.pop(0)
        if not held.left:
            del self.held[request_id]
        finish = "cancelled" if held.is_cancelled else reason
        held.on_output(Output(answer, (), 1, finish, error=error))  # type: ignore[arg-type]

    def end_all(self, request_id: str) -> None:
        while request_id in self.held:
            self.end(request_id)

    def refuse(self, request_id: str, error: PenstockError) -> None:
        self.held.pop(request_id).on_failed(error)

    def lose(self) -> None:
        self.is_alive = False
        held, self.held = list(self.held.values()), {}
        self.say()
        for each in held:
            each.on_failed(ReplicaLost("the replica was lost"))

    def revive(self) -> None:
        self.is_alive = True
        self.say()
