"""Whom a request that is longer than one memory asks for blocks, and what becomes of it when one of them dies."""

from __future__ import annotations

from typing import Any

from penstock.cluster.fleet import Fleet
from penstock.cluster.link import ReplicaLink
from penstock.cluster.router import Router
from penstock.core.clock import now
from penstock.core.messages import Lent, Recalled
from penstock.core.prompt import HashedPrompt
from penstock.core.types import Report, Request, RequestId, Sampling
from penstock.policy import find
from penstock.report.log import Memory
from penstock.sim.loop import run
from tests.cluster.null import NullReplica

BLOCKS = 100


class Lender(NullReplica):
    """Says that it has blocks, and answers when the test does."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.asked: list[tuple[int, Any]] = []
        self.borrowed: list[int] = []

    def say(self) -> None:
        self._on_report(
            Report(
                replica=self.name,
                at=now(),
                is_alive=self.is_alive,
                free_blocks=BLOCKS,
                total_blocks=BLOCKS,
                lent_blocks=0,
            )
        )

    def lend(self, loan: int, num_blocks: int, on_lent: Any) -> None:
        if self.is_alive:
            self.asked.append((loan, on_lent))

    def borrow(self, loan: int, request_id: str, num_blocks: int, address: str) -> None:
        self.borrowed.append(loan)

    def give_back(self, loan: int) -> None: ...

    def answer(self, error: str | None = None) -> None:
        loan, on_lent = self.asked.pop(0)
        on_lent(Lent(loan, self.name, error))


def test_a_creditor_that_died_while_another_was_asked_is_left_out() -> None:
    async def main() -> None:
        replicas = [Lender(name) for name in ("a", "b", "c", "d")]
        home, first, second, third = replicas
        router = Router("fleet", find("route", "round-robin")(), log=Memory())
        fleet = Fleet("m", replicas, router)
        for replica in replicas:
            replica.say()
        ended: list[Exception | None] = []
        fleet.start(
            Request(
                id=RequestId("long"),
                model="m",
                prompt=HashedPrompt(BLOCKS * 16),
                sampling=Sampling(max_tokens=160),
            ),
            ended.append,
        )
        second.lose()
        first.answer("it has no room")
        assert not second.asked and third.asked
        third.answer()
        assert home.seen == ["long"] and home.borrowed
        home.end_all("long")
        assert ended == [None] and not fleet.num_outstanding

    run(main())


def test_answers_to_whoever_controlled_a_replica_before_are_passed_over() -> None:
    link = ReplicaLink("a")
    link._hear_move(Lent(5))
    link._hear_move(Recalled(5))
    told: list[object] = []
    link.lend(6, 3, told.append)
    link._hear_move(Lent(6, "here"))
    assert told == [Lent(6, "here")]
