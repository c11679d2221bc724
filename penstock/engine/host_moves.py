"""A replica's part in movements, between its channel and its turns: orders go in, blocks are pulled, answers go out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from penstock.core.errors import PenstockError
from penstock.core.images import images_of
from penstock.core.messages import (
    Borrow,
    GiveBack,
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
from penstock.core.moving import KvCard
from penstock.core.ports import Transport
from penstock.core.transport import EmbeddingTransport
from penstock.core.types import Stage
from penstock.engine.joinings import Landing, Pairs, Taking
from penstock.engine.loans import Borrowing, Lending, Returning
from penstock.engine.partings import Offering, Settling
from penstock.engine.pauses import GoingOn, Pausing
from penstock.engine.recalls import Recalling
from penstock.engine.replica import Replica

STATE_BYTES = 512  # what a modelled link is charged for a state, beside its tokens
TOKEN_BYTES = 4
Say = Callable[[object, int], None]
LoanTold = Lend | Borrow | GiveBack | Recall


class HostMoves:
    """`transport` None: requests move without their keys and values."""

    def __init__(
        self,
        replica: Replica,
        transport: Transport | None,
        say: Say,
        touch: Callable[[], None] = lambda: None,
    ) -> None:
        """`touch` hears when something has changed that nobody is told of."""
        self._replica, self._transport, self._say = replica, transport, say
        self._touch = touch
        self._open: dict[int, str] = {}  # requests of movements that are not settled
        self._loans: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def card(self) -> KvCard | None:
        """None: requests cannot move."""
        if not self._replica.moves_jobs:
            return None
        if self._transport is None:
            return KvCard(
                layout="", address="", block_size=self._replica.config.block_size, block_bytes=0
            )
        return self._transport.card

    def hear(self, told: Offer | Take | Settle | LoanTold) -> None:
        if isinstance(told, LoanTold):
            self._hear_loan(told)
        elif isinstance(told, Offer):
            if told.is_last:  # whoever is only shown has nothing to be settled
                self._open[told.move] = told.request
            self._replica.move(Offering(told.move, told.request, told.is_last, self._say_offered))
        elif isinstance(told, Settle):
            self._open.pop(told.move, None)
            self._replica.move(Settling(told.move, told.request, told.how))
        else:
            self._open[told.move] = told.name
            self._take(told)

    def _hear_loan(self, told: LoanTold) -> None:
        loan, replica = told.loan, self._replica
        if isinstance(told, GiveBack):
            if told.num_blocks is None:
                self._loans.discard(loan)
            replica.move(Returning(loan, told.num_blocks))
            return
        if isinstance(told, Recall):
            self._loans.update([fresh for fresh, _, _ in told.into])

            def on_recalled(error: str | None) -> None:
                self._say(Recalled(loan, error), STATE_BYTES)

            replica.move(Recalling(loan, told.num_blocks, told.into, on_recalled))
            return
        if isinstance(told, Lend) and replica.is_draining:
            self._say(Lent(loan, "", "it is shutting down"), STATE_BYTES)
            return
        self._loans.add(loan)
        if isinstance(told, Borrow):
            replica.move(Borrowing(loan, told.request, told.num_blocks, told.address))
        else:

            def on_lent(address: str, error: str | None) -> None:
                if error is not None:
                    self._loans.discard(loan)  # nobody gives back what was not lent
                self._say(Lent(loan, address, error), STATE_BYTES)

            replica.move(Lending(loan, told.num_blocks, on_lent))

    def pause(self, request: str, before: Stage) -> None:
        """See engine.pauses."""
        self._replica.move(Pausing(request, before))

    def go_on(self, request: str) -> None:
        self._replica.move(GoingOn(request))

    def abandon(self) -> None:
        """Whoever has ordered all this is gone: what was to leave stays, what was to come is dropped.

        The host cancels all requests behind this, which ends those that pause too (engine.pauses).
        """
        for loan in sorted(self._loans):
            self._replica.move(Returning(loan))
        self._loans.clear()
        movements, self._open = self._open, {}
        for move, request in movements.items():
            self._replica.move(Settling(move, request, "resume"))

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._transport is not None:
            await self._transport.close()

    # ---------------------------------------------------------------- inside

    def _say_offered(self, offered: Offered) -> None:
        state = offered.state
        if state is None:  # it has ended, and so may the movement, without a word
            self._open.pop(offered.move, None)
        num_tokens = len(offered.blocks) + (0 if state is None else len(state.output_ids))
        self._say(offered, STATE_BYTES + TOKEN_BYTES * num_tokens)

    def _take(self, told: Take) -> None:
        def on_granted(pairs: Pairs | str) -> None:
            if isinstance(pairs, str):
                self._say(Taken(told.move, told.is_last, error=pairs), STATE_BYTES)
            elif pairs or _brings_embeddings(told):
                self._pull(told, pairs)
            else:
                self._land(told, 0, None)

        state, blocks = told.state, told.blocks
        order = Taking(
            told.move, told.name, state, told.is_last, told.waits, told.request, blocks, on_granted
        )
        try:
            if told.request is not None and self._replica.config.has_prefix_cache:
                told.request.prompt.blocks(self._replica.config.block_size)
            self._replica.move(order)
        except (PenstockError, ValueError) as error:
            self._say(Taken(told.move, told.is_last, error=str(error)), STATE_BYTES)
            return
        if told.pauses is not None:
            self.pause(told.name, told.pauses)

    def _pull(self, told: Take, pairs: Pairs) -> None:
        task = asyncio.get_running_loop().create_task(self._copy(told, pairs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _copy(self, told: Take, pairs: Pairs) -> None:
        error, num_bytes = None, 0
        try:
            if self._transport is None:
                error = "this replica cannot copy blocks"
            elif pairs:
                await self._transport.pull(told.address, pairs)
            else:
                num_bytes = await self._pull_embeddings(told, self._transport)
        except PenstockError as failed:
            error = failed.message
        self._land(told, sum([count for _, _, count in pairs]), error, num_bytes)

    async def _pull_embeddings(self, told: Take, transport: Transport) -> int:
        assert told.request is not None, "nothing of it came before"
        num_tokens = sum(images_of(told.request)[: told.state.encoded])
        return await cast(EmbeddingTransport, transport).pull_embeddings(told.address, num_tokens)

    def _land(self, told: Take, num_blocks: int, error: str | None, num_bytes: int = 0) -> None:
        taken = Taken(told.move, told.is_last, num_blocks, error, num_bytes)
        self._replica.move(Landing(told.move, error, lambda: self._say(taken, STATE_BYTES)))
        self._touch()  # nobody is answered where it was dropped meanwhile, and that frees its blocks


def _brings_embeddings(told: Take) -> bool:
    """Where keys and values come, nobody needs what they were made of."""
    return told.state.encoded > 0 and not told.state.computed and bool(told.address)
