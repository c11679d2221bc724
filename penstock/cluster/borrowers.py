"""Requests that have, or look for, blocks of other replicas: what the fleet knows of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from penstock.core.errors import PenstockError
from penstock.core.types import Report, Request
from penstock.policy.loads import LENDERS_KEEP, away_of

if TYPE_CHECKING:
    from penstock.cluster.ticket import Ticket

LEAST = (
    32  # a loan is 1 / LEAST of its memory, or all that is missing: each takes a line of its own
)
OnReady = Callable[[PenstockError | None], None]


class Kept(NamedTuple):
    """One loan: who keeps how many blocks, and where its home finds them."""

    creditor: str
    num: int
    address: str


@dataclass(slots=True)
class Borrower:
    """`on_ready` is set while it waits to be sent, since `came_at`. `missing`: blocks that it still looks for, with
    `creditors` to be asked yet. `coming`: loans that are to take over what is called back (`is_moving`).
    """

    ticket: Ticket
    home: str
    missing: int = 0
    on_ready: OnReady | None = None
    came_at: float = 0.0
    creditors: list[str] = field(default_factory=list)
    loans: dict[int, Kept] = field(default_factory=dict)
    coming: dict[int, Kept] = field(default_factory=dict)
    is_asking: bool = False
    is_moving: bool = False
    moved_at: float | None = None

    @property
    def num_kept(self) -> int:
        return sum([kept.num for kept in self.loans.values()])


def blocks_of(request: Request, block_size: int) -> int:
    """That its longest context takes."""
    return -(-(request.prompt.num_tokens + request.sampling.max_tokens) // block_size)


def must_lend(request: Request, report: Report) -> int:
    """Blocks of a request that others must keep."""
    return away_of(blocks_of(request, report.block_size), report.total_blocks)


def can_lend(report: Report, home: str) -> bool:
    is_up = report.is_alive and not report.is_draining and not report.is_suspect
    return is_up and report.replica != home


def most_of(report: Report) -> int:
    """What it could lend if it had nothing else to do."""
    return report.total_blocks - report.total_blocks // LENDERS_KEEP - 2


def spare_of(report: Report) -> int:
    """Blocks beyond those that it keeps for what it runs, which has grown since it reported, and for who is next."""
    kept = report.total_blocks // LENDERS_KEEP + 2 * report.num_running + 1
    return report.free_blocks - report.head_blocks - kept
