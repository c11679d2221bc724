"""What a replica owes: loans that others keep blocks for, and the numbers that these blocks have in tables here.

The loans of one request stand in a row, and what is away of it fills them from the first on; so how many of its blocks
are away says which numbers they have. A loan that is cut gives up the last of its numbers, and those that take its
blocks over stand right behind it, where the row has its gap. Numbers begin behind the replica's own blocks, and none is
given twice while anything is owed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice

from msgspec import Struct

from penstock.engine.lending_ledger import LendingLedger


class Debt(Struct, gc=False):
    loan: int
    request: str
    first: int
    count: int


class Debts:
    """One replica's; what requests may have away (`credit`) is kept in its ledger."""

    def __init__(self, ledger: LendingLedger) -> None:
        self._ledger, self._next = ledger, ledger.total
        self._debts: dict[int, Debt] = {}

    def __bool__(self) -> bool:
        return bool(self._debts)

    def get(self, loan: int) -> Debt | None:
        return self._debts.get(loan)

    def requests(self) -> list[str]:
        return list({each.request: None for each in self._debts.values()})

    def made(self, loan: int, request: str, count: int) -> Debt:
        """With numbers of its own; not owed yet."""
        if not self._debts:
            self._next = self._ledger.total
        debt = Debt(loan, request, self._next, count)
        self._next += count
        return debt

    def owe(self, debt: Debt) -> None:
        self._debts[debt.loan] = debt
        self._grant(debt.request, debt.count)

    def end(self, loan: int) -> bool:
        """Whether it was owed."""
        debt = self._debts.pop(loan, None)
        if debt is not None:
            self._grant(debt.request, -debt.count)
        return debt is not None

    def numbers(self, request: str, first: int, count: int) -> list[int]:
        """So many, from the first on, of what its blocks are called when they are away."""
        known = chain.from_iterable(
            [range(each.first, each.first + each.count) for each in self._of(request)]
        )
        return list(islice(known, first, first + count))

    def used(self, debt: Debt, away: int) -> int:
        """Blocks of it that are, when so many of the request's are away."""
        before = 0
        for each in self._of(debt.request):
            if each.loan == debt.loan:
                break
            before += each.count
        return max(0, min(debt.count, away - before))

    def cut(self, debt: Debt, count: int, fresh: Sequence[Debt]) -> None:
        """The last `count` blocks of it are others'."""
        self._grant(debt.request, sum([each.count for each in fresh]) - count)
        debt.count -= count
        row: list[Debt] = []
        for each in self._debts.values():
            row += [each, *fresh] if each is debt else [each]
        self._debts = {each.loan: each for each in row if each.count}

    def _of(self, request: str) -> list[Debt]:
        return [each for each in self._debts.values() if each.request == request]

    def _grant(self, request: str, count: int) -> None:
        credit = self._ledger.credit
        left = credit.get(request, 0) + count
        if left:
            credit[request] = left
        else:
            credit.pop(request, None)
