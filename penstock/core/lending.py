"""What replicas and fleets write about context that is lent. Written and read like the events of core.events."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class Loaned(Struct, kw_only=True, frozen=True, gc=False):
    """A creditor was asked for blocks (input), and took them for a loan, or `error` says why not."""

    kind: Literal["loaned"] = "loaned"
    at: float
    who: str
    loan: int
    num_blocks: int
    error: str | None = None


class Owed(Struct, kw_only=True, frozen=True, gc=False):
    """A debtor was told of a loan for one of its requests (input)."""

    kind: Literal["owed"] = "owed"
    at: float
    who: str
    loan: int
    request: str
    num_blocks: int


class Spilled(Struct, kw_only=True, frozen=True, gc=False):
    """So many more of a request's first blocks are at its creditors, or could not get there (input)."""

    kind: Literal["spilled"] = "spilled"
    at: float
    who: str
    request: str
    num_blocks: int
    error: str | None = None


class Recalled(Struct, kw_only=True, frozen=True, gc=False):
    """A debtor was told that a creditor wants blocks of a loan back (input), and which loans (number, blocks) take them
    over; the others come home.
    """

    kind: Literal["recalled"] = "recalled"
    at: float
    who: str
    loan: int
    num_blocks: int
    into: tuple[tuple[int, int], ...] = ()


class Relocated(Struct, kw_only=True, frozen=True, gc=False):
    """What a loan keeps no longer was copied, or could not be (input)."""

    kind: Literal["relocated"] = "relocated"
    at: float
    who: str
    loan: int
    error: str | None = None


class LoanOver(Struct, kw_only=True, frozen=True, gc=False):
    """A loan is over for this replica (input): a creditor has its blocks back, a debtor's request has ended.

    `num_blocks`: only so many of them are given back.
    """

    kind: Literal["loan_over"] = "loan_over"
    at: float
    who: str
    loan: int
    num_blocks: int | UnsetType = UNSET


LendingEvent = Loaned | Owed | Spilled | Recalled | Relocated | LoanOver
