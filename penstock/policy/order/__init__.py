"""Who goes next? Asked by the replica before each step, about the jobs that wait.

Law: the ranking is a permutation of the waiting jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol

from penstock.core.records import Record
from penstock.core.views import (
    NO_PROGRAMS,
    Columns,
    Cost,
    JobView,
    Ledger,
    Lengths,
    Programs,
    Rng,
)

if TYPE_CHECKING:
    from numpy import intp
    from numpy.typing import NDArray

STABLE = (
    1 << 30
)  # steps: longer than any run of steps, for a ranking that no passing of time changes
FEW = 64  # jobs up to which plain Python sorts faster than arrays are gathered


@dataclass(slots=True)
class View:
    """`waiting` is in arrival order, with preempted jobs first (latest preempted at the head).

    `ledger` tells what each would find in the prefix cache; None: nothing is known of it.
    """

    now: float
    rng: Rng
    waiting: Sequence[JobView]
    running: Sequence[JobView]
    cost: Cost
    lengths: Lengths
    columns: Callable[[], Columns]  # over `waiting`
    ledger: Ledger | None = None
    programs: Programs = NO_PROGRAMS


class Decision(Record):
    """`stable_for`: steps for which the same ranking would be given if nothing arrived, ended or left."""

    ranking: Sequence[JobView]
    why: str = ""
    stable_for: int = 1


def law(view: View, decision: Decision) -> None:
    asked = sorted(job.seq for job in view.waiting)
    given = sorted(job.seq for job in decision.ranking)
    assert asked == given, f"the ranking {given} is not a permutation of the waiting jobs {asked}"
    assert decision.stable_for >= 1, "stable_for counts this step, so it is at least 1"


def deadline_at(job: JobView) -> float:
    """The earliest instant promised next, inf where nothing is promised.

    Before the first token that is arrival + ttft_s, then the instant at which the mean gap allows the next token;
    arrival + deadline_s bounds both. The column `deadline_at` holds the same numbers.
    """
    slo = job.request.slo
    at = inf if slo.deadline_s is None else job.arrived_at + slo.deadline_s
    if job.first_token_at is None:
        return at if slo.ttft_s is None else min(at, job.arrived_at + slo.ttft_s)
    if slo.tpot_s is None:
        return at
    return min(at, job.first_token_at + slo.tpot_s * job.num_output)


def in_order(waiting: Sequence[JobView], ranks: NDArray[intp]) -> list[JobView]:
    """The jobs at these places, two at least, as a ranking."""
    return list(itemgetter(*ranks.tolist())(waiting))


def num_returned(waiting: Sequence[JobView]) -> int:
    """How many of the waiting were preempted; they stand first."""
    for place, job in enumerate(waiting):
        if not job.num_preemptions:
            return place
    return len(waiting)


class Policy(Protocol):
    def decide(self, view: View) -> Decision: ...
