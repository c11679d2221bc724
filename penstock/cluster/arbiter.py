"""Which of the wanted moves may begin: the rules that hold whatever the policy.

    pair      not A to B and B to A in one cycle
    side      a replica gives or takes in one cycle, not both (requests that only change queues are free of it)
    slots     at most `slots` movements at a time with KV of one replica, those under way counted
    stale     nothing on the word of a report older than `stale_s`
    cooldown  a request that moved stays for `cooldown_s`

Each move that is turned down is named with its rule; the policy may want it again next time. `stale` holds for loans
too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from penstock.core.types import Report
from penstock.policy.move import Loan, Move


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveRules:
    """`slots`: movements of one replica at a time. The figures are Llumnix's."""

    slots: int = 1
    stale_s: float = 60.0
    cooldown_s: float = 0.0

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"slots must be at least 1, got {self.slots}")
        if not self.stale_s > 0 or not self.cooldown_s >= 0:
            raise ValueError("stale_s must be positive and cooldown_s at least 0")


Refused = tuple[Move | Loan, str]


def sift(
    moves: Sequence[Move],
    *,
    now: float,
    reports: Mapping[str, Report],
    under_way: Sequence[tuple[str, str]],
    moved_at: Mapping[str, float],
    rules: MoveRules,
) -> tuple[list[Move], list[Refused]]:
    """Those that may begin, and the others with their rule. `under_way`: (source, target) of movements with KV."""
    kept: list[Move] = []
    refused: list[Refused] = []
    sources = {source for source, _ in under_way}
    targets = {target for _, target in under_way}
    busy = Counter(name for pair in under_way for name in pair)
    pairs = set(under_way)
    for move in moves:
        rule = None
        if any(now - reports[name].at > rules.stale_s for name in (move.source, move.target)):
            rule = "stale"
        elif now - moved_at.get(move.request, -rules.cooldown_s) < rules.cooldown_s:
            rule = "cooldown"
        elif move.mode != "queued":
            if (move.target, move.source) in pairs:
                rule = "pair"
            elif move.source in targets or move.target in sources:
                rule = "side"
            elif max(busy[move.source], busy[move.target]) >= rules.slots:
                rule = "slots"
        if rule is not None:
            refused.append((move, rule))
            continue
        kept.append(move)
        if move.mode != "queued":
            sources.add(move.source)
            targets.add(move.target)
            pairs.add((move.source, move.target))
            busy.update((move.source, move.target))
    return kept, refused


def sift_loans(
    loans: Sequence[Loan], *, now: float, reports: Mapping[str, Report], rules: MoveRules
) -> tuple[tuple[Loan, ...], list[Refused]]:
    """Those that may be asked for, and the others."""
    late = [
        loan
        for loan in loans
        if any(now - reports[name].at > rules.stale_s for name in (loan.debtor, loan.creditor))
    ]
    return tuple([loan for loan in loans if loan not in late]), [(each, "stale") for each in late]
