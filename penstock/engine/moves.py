"""Movements as one replica sees them: whom it lets go (partings), whom it takes in (joinings); and cached blocks that
it fetches from peers (seeks) or keeps for them (pins)."""

from __future__ import annotations

from collections.abc import Callable

from penstock.core.moving import Settled
from penstock.engine.bringing import Bringing
from penstock.engine.flights import Flights
from penstock.engine.joinings import Joinings, Landing, Taking
from penstock.engine.loans import Borrowing, Copied, Lending, LoanOrder, Loans, Returning
from penstock.engine.partings import Offering, Partings, Settling
from penstock.engine.parts import Parts
from penstock.engine.pauses import GoingOn, Pauses, Pausing
from penstock.engine.pins import Pinning, Pins, Unpinning
from penstock.engine.recalls import Recalling, Recalls, Relocating
from penstock.engine.seeks import SeekOrder, Seeks
from penstock.engine.stand_ins import StandIns

FetchOrder = SeekOrder | Pinning | Unpinning
Order = Offering | Taking | Landing | Settling | Pausing | GoingOn | LoanOrder | FetchOrder


class Moves:
    """Applies orders, in a turn; what is to be answered waits until the turn has told its outputs."""

    def __init__(
        self,
        parts: Parts,
        flights: Flights,
        bringing: Bringing,
        ask_again: Callable[[], None],
        put: Callable[[LoanOrder], None],
        *,
        pull_share: float | None = None,
    ) -> None:
        """What plans under way will need is taken before others get blocks, and what they write does not travel."""
        take_blocks = flights.take_blocks
        self.loans = (
            Loans(parts, put, take_blocks, ask_again) if parts.executor.caps.lends else None
        )
        self._emit, self._name = parts.emit, parts.name
        self.pauses = Pauses(parts, ask_again)
        self.partings = Partings(parts, self.pauses, ask_again, flights.written)
        self.joinings = Joinings(parts, take_blocks, ask_again, pull_share=pull_share)
        stand_ins = StandIns(parts, take_blocks)
        self.pins = Pins(parts, stand_ins, flights.written)
        self.seeks = parts.seeks = Seeks(parts, stand_ins, bringing, take_blocks, ask_again)
        if parts.tiers is not None:
            parts.tiers.read_by_peers = self.pins.held
        self._answering: list[Partings | Joinings | Loans | Recalls | StandIns] = [
            self.partings, self.joinings, stand_ins
        ]  # fmt: skip
        if self.loans is not None:
            self._answering += [self.loans, self.loans.recalls]

    @property
    def is_waiting(self) -> bool:
        """Whether somebody waits to leave or to pause."""
        if self.partings.asked or self.pauses.asked or self.seeks.under_way:
            return True
        return self.loans is not None and self.loans.has_debts

    @property
    def is_lending(self) -> bool:
        """Whether blocks are kept here for others, or are on their way from there."""
        if not self.pins.is_empty or self.seeks.under_way:
            return True
        return self.loans is not None and self.loans.is_lending

    def apply(self, now: float, order: Order) -> None:
        if isinstance(order, (Pausing, GoingOn)):
            self.pauses.apply(now, order)
        elif isinstance(order, Offering):
            self.partings.offer(now, order)
        elif isinstance(order, Taking):
            self.joinings.take(now, order)
        elif isinstance(order, (Lending, Borrowing, Returning, Copied, Recalling, Relocating)):
            assert self.loans is not None, "this replica does not lend"
            self.loans.apply(now, order)
        elif isinstance(order, Pinning):
            self.pins.pin(now, order)
        elif isinstance(order, Unpinning):
            self.pins.unpin(now, order)
        elif isinstance(order, SeekOrder):
            self.seeks.apply(now, order)
        elif isinstance(order, Landing):
            self.joinings.land(now, order)
        else:
            self._emit(
                Settled(
                    at=now, who=self._name, move=order.move, request=order.request, how=order.how
                )
            )
            self.partings.settle(now, order)
            self.joinings.settle(now, order)

    def look(self, now: float) -> None:
        """Something was applied: who pauses, can leave or has room now?"""
        self.pauses.look(now)
        if self.loans is not None and self.loans.has_debts:
            self.loans.look(now)
        if self.partings.asked:
            self.partings.depart(now)
        if self.joinings.is_waiting:
            self.joinings.grant(now)
        if self.seeks.under_way:
            self.seeks.look(now)

    def answer(self) -> None:
        for told in self._answering:
            if told.answers:
                answers, told.answers = told.answers, []
                for answer in answers:
                    answer()
