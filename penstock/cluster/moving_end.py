"""What a replica's link says and hears of movements; see cluster.movement for who says it when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

from penstock.core.errors import PenstockError, ReplicaLost
from penstock.core.messages import (
    Borrow,
    GiveBack,
    GoOn,
    Lend,
    Lent,
    Offer,
    Offered,
    Recall,
    Recalled,
    Settle,
    Take,
    Taken,
)
from penstock.core.moving import KvCard, SettleHow
from penstock.core.ports import OnMoved
from penstock.core.types import Request, Stage

SMALL_BYTES = 256  # what a modelled link is charged for a message without tokens
TOKEN_BYTES = 4
OnLent = Callable[[Lent | PenstockError], None]
OnRecalled = Callable[[Recalled | PenstockError], None]


class MovingEnd(ABC):
    """A part of cluster.link.ReplicaLink, which hands messages over (`_put`)."""

    def __init__(self) -> None:
        self._kv: KvCard | None = None
        self._moves: dict[int, OnMoved] = {}
        self._lending: dict[int, OnLent] = {}
        self._recalling: dict[int, OnRecalled] = {}

    @abstractmethod
    def _put(self, message: object, num_bytes: int = 0) -> None:
        """Say it, unless there is nobody to say it to."""

    def _hear_move(self, told: Offered | Taken | Lent | Recalled) -> None:
        if isinstance(told, Lent):
            on_lent = self._lending.pop(told.loan, None)
            if on_lent is not None:  # else whoever controlled the replica before asked for it
                on_lent(told)
            return
        if isinstance(told, Recalled):
            on_recalled = self._recalling.pop(told.loan, None)
            if on_recalled is not None:
                on_recalled(told)
            return
        on_moved = self._moves.get(told.move)
        if on_moved is not None:
            on_moved(told)

    def _lose_moves(self, lost: ReplicaLost) -> None:
        moves, self._moves, self._kv = list(self._moves.values()), {}, None
        for on_moved in moves:
            on_moved(lost)
        lending, self._lending = list(self._lending.values()), {}
        for on_lent in lending:
            on_lent(lost)
        recalling, self._recalling = list(self._recalling.values()), {}
        for on_recalled in recalling:
            on_recalled(lost)

    @property
    def kv(self) -> KvCard | None:
        return self._kv

    def attend(self, move: int, on_moved: OnMoved) -> None:
        self._moves[move] = on_moved

    def forget(self, move: int) -> None:
        self._moves.pop(move, None)

    def lend(self, loan: int, num_blocks: int, on_lent: OnLent) -> None:
        """`on_lent` hears once."""
        self._lending[loan] = on_lent
        self._put(Lend(loan, num_blocks))

    def borrow(self, loan: int, request_id: str, num_blocks: int, address: str) -> None:
        self._put(Borrow(loan, request_id, num_blocks, address))

    def give_back(self, loan: int, num_blocks: int | None = None) -> None:
        self._put(GiveBack(loan, num_blocks))

    def recall(
        self,
        loan: int,
        num_blocks: int,
        into: tuple[tuple[int, int, str], ...],
        on_recalled: OnRecalled,
    ) -> None:
        """`on_recalled` hears once."""
        self._recalling[loan] = on_recalled
        self._put(Recall(loan, num_blocks, into))

    def go_on(self, request_id: str) -> None:
        self._put(GoOn(request_id))

    def offer(self, move: int, request_id: str, is_last: bool) -> None:
        self._put(Offer(move, request_id, is_last))

    def take(
        self,
        move: int,
        request: Request,
        offered: Offered,
        *,
        address: str,
        is_first: bool,
        waits: bool = False,
        pauses: Stage | None = None,
    ) -> None:
        state = offered.state
        assert state is not None, "nothing was offered"
        if not address:
            state = replace(state, computed=0, encoded=0)
        told = Take(
            move,
            request.id,
            state,
            offered.is_last,
            waits,
            request if is_first else None,
            address,
            offered.blocks if address else (),
            pauses,
        )
        num_tokens = len(state.output_ids) + len(told.blocks)
        self._put(told, TOKEN_BYTES * (num_tokens + is_first * request.prompt.num_tokens))

    def settle(self, move: int, request_id: str, how: SettleHow) -> None:
        self.forget(move)
        self._put(Settle(move, request_id, how))
