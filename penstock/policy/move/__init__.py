"""What changes place while running? Asked of a fleet every `every_s` seconds of the policy, and on what happens to it.

A policy names requests and where they are to be; a mechanism moves them (cluster.movement) and says in the log what
became of it. A policy that chooses among requests says `needs_jobs`, and reports then list them.

    live       with its KV blocks, copied in stages while it goes on being served
    blocking   with its KV blocks, copied while it stands still
    pull       the target takes it, blocks and all, when it has room; the source keeps the blocks until then
    queued     the request alone: nothing of it has been computed yet

Where replicas lend memory, a policy may say too that another replica is to keep so many blocks of a request that runs
(`loans`), or that so many that it keeps are to come home (`recalls`); it sees who keeps what (`lent`), by the fleet's
own count.

Experts of a mixture change place too, from one device of a replica to another: whoever serves them is asked about one
layer at a time, with `experts` and no reports, and answers which experts each device holds from now on.

Law: a move leads from a replica that is alive to another one that is alive, not draining and of a fitting role; no
request is moved twice at once. A loan is between two replicas that are alive, of a creditor that is not draining and
has the blocks, and for a request that does not move; what is called back was lent. Every expert has a place on the
devices there are to be, none has two on one device, and no device holds more than its slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from msgspec import Struct

from penstock.core.moving import MoveMode as MoveMode
from penstock.core.types import Report
from penstock.core.views import Loan as Loan
from penstock.core.views import Move as Move
from penstock.core.views import PhaseCost, Rng

Cause = Literal["tick", "joined", "lost", "draining", "prefilled", "routed"]


Slots = tuple[tuple[int, ...], ...]  # by device, the experts that it holds


class Experts(Struct, gc=False):
    """One layer's experts. `loads`: rows that each took lately. `now`: what each device holds; `devices`: how many
    there are to be; `room`: experts that one can hold.
    """

    loads: Sequence[float]
    now: Slots
    devices: int
    room: int


class View(Struct, gc=False):
    """`reports` may be stale, `outstanding` and `moving` (request -> target) are the fleet's own and exact.

    `cause`: why it is asked. `about`: the request (prefilled, routed) or replica (joined, lost, draining) concerned.
    """

    now: float
    rng: Rng
    reports: Sequence[Report]
    outstanding: Mapping[str, int]
    moving: Mapping[str, str]
    cause: Cause = "tick"
    about: str = ""
    experts: Experts | None = None
    lent: Mapping[str, Sequence[tuple[str, int]]] = {}  # by request, creditors and blocks
    cost: PhaseCost | None = None  # where the policy `needs_cost`


class Decision(Struct, frozen=True, gc=False):
    """`why` is not empty when something moves. `experts` None: they stay."""

    moves: tuple[Move, ...] = ()
    why: str = ""
    experts: Slots | None = None
    loans: tuple[Loan, ...] = ()
    recalls: tuple[Loan, ...] = ()  # of loans that there are, so much


def law(view: View, decision: Decision) -> None:
    alive = {report.replica for report in view.reports if report.is_alive}
    open_ones = {each.replica for each in view.reports if each.is_alive and not each.is_draining}
    seen: set[str] = set()
    for move in decision.moves:
        assert move.source != move.target, f"{move.request} moves to where it is"
        assert move.source in alive, f"{move.source} cannot give {move.request} away"
        assert move.target in open_ones, f"{move.target} cannot take {move.request}"
        assert move.request not in seen and move.request not in view.moving, (
            f"{move.request} is moved twice at once"
        )
        seen.add(move.request)
    for loan in decision.loans:
        _loan_law(view, loan, alive, open_ones)
        assert loan.request not in seen, f"{loan.request} moves, and a loan is made for it"
    for loan in decision.recalls:
        kept = sum([num for name, num in view.lent.get(loan.request, ()) if name == loan.creditor])
        assert loan.debtor in alive, f"{loan.debtor} cannot take {loan.request} home"
        assert 0 < loan.num_blocks <= kept, f"{loan.creditor} keeps {kept} of {loan.request}"
    is_something = decision.moves or decision.experts or decision.loans or decision.recalls
    assert decision.why or not is_something, "a move without a reason"
    if decision.experts is not None:
        assert view.experts is not None, "nobody asked about experts"
        _experts_law(view.experts, decision.experts)


def _loan_law(view: View, loan: Loan, alive: set[str], open_ones: set[str]) -> None:
    free = {report.replica: report.free_blocks for report in view.reports}
    assert loan.debtor in alive and loan.creditor in open_ones, f"{loan} is of nobody"
    assert loan.debtor != loan.creditor, f"{loan.debtor} lends to itself"
    assert 0 < loan.num_blocks <= free[loan.creditor], f"{loan.creditor} has no {loan.num_blocks}"
    assert loan.request not in view.moving, f"{loan.request} is moving"


def _experts_law(asked: Experts, slots: Slots) -> None:
    assert len(slots) == asked.devices, f"{len(slots)} devices, there are to be {asked.devices}"
    for device, held in enumerate(slots):
        assert len(held) <= asked.room, f"device {device} has room for {asked.room}"
        assert len(set(held)) == len(held), f"device {device} holds an expert twice"
    everyone = {expert for held in slots for expert in held}
    assert everyone == set(range(len(asked.loads))), "an expert has no place, or is unknown"


class Policy(Protocol):
    def decide(self, view: View) -> Decision: ...
