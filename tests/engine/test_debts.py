"""The row of loans that a request's blocks fill: whatever is cut out of it and put in, no block changes its keeper."""

from __future__ import annotations

import random

import pytest

from penstock.engine.debts import Debts
from penstock.engine.lending_ledger import LendingLedger

TOTAL = 50


@pytest.mark.parametrize("seed", range(40))
def test_what_is_away_fills_the_row_from_its_beginning(seed: int) -> None:
    """A plain list of (loan, place in it) for every block that is away says the same as the numbers."""
    chance, ledger = random.Random(seed), LendingLedger(TOTAL, 4)
    debts, away, loans = Debts(ledger), list[int](), dict[int, int]()
    for turn in range(80):
        what = chance.choice(("owe", "spill", "spill", "cut", "cut", "end"))
        if what == "owe":
            debt = debts.made(turn, "r", chance.randint(1, 9))
            assert debt.first >= TOTAL and not set(
                range(debt.first, debt.first + debt.count)
            ) & set(away)
            debts.owe(debt)
            loans[turn] = debt.count
        elif what == "spill":
            count = chance.randint(0, sum(loans.values()) - len(away))
            fresh = debts.numbers("r", len(away), count)
            assert len(fresh) == count and not set(fresh) & set(away)
            away += fresh
        elif what == "cut" and loans:
            away = cut(chance, debts, loans, away, turn)
        elif what == "end" and not away:
            for loan in list(loans):
                assert debts.end(loan)
            loans.clear()
            assert not debts and not debts.end(3)
        assert ledger.credit.get("r", 0) == sum(loans.values())
        assert debts.numbers("r", 0, len(away)) == away


def cut(
    chance: random.Random, debts: Debts, loans: dict[int, int], away: list[int], turn: int
) -> list[int]:
    """What a creditor gets back goes to another one, home, or to both; what is away afterwards, in order."""
    loan = chance.choice(sorted(loans))
    debt = debts.get(loan)
    assert debt is not None
    count = chance.randint(1, debt.count)
    room = chance.randint(0, count)
    mine = [number for number in away if debt.first <= number < debt.first + debt.count]
    assert debts.used(debt, len(away)) == len(mine)
    stays = mine[: debt.count - count]
    goes = mine[len(stays) :]
    fresh = [debts.made(100 + turn, "r", room)] if room else []
    moved = [fresh[0].first + at for at in range(min(room, len(goes)))] if room else []
    debts.cut(debt, count, fresh)
    loans[loan] -= count
    if not loans[loan]:
        del loans[loan]
        assert debts.get(loan) is None
    if room:
        loans[100 + turn] = room
    place = away.index(mine[0]) if mine else len(away)
    return [*away[:place], *stays, *moved, *away[place + len(mine) :]]
