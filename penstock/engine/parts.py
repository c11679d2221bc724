"""What the pieces of one replica share: its jobs, their blocks, what the executor was told, and who hears of events.

replica    what others call, the inbox, the order of a turn
flights    plans that run or are suspended
outcomes   what came back from the executor changes jobs
launch     what the policies decided becomes evictions, admissions and plans
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, get_args

from msgspec import UNSET, UnsetType

from penstock.core.events import Event
from penstock.core.moving import Departed
from penstock.core.plans import Sampled
from penstock.core.ports import Executor, Log
from penstock.core.types import FinishReason, Job
from penstock.engine.briefing import Briefing
from penstock.engine.ledger import BlockLedger
from penstock.engine.roster import NOTHING, Roster
from penstock.engine.swap import Swap

if TYPE_CHECKING:
    from penstock.engine.seeks import Seeks
    from penstock.engine.tiers import Tiers

Emit = Callable[[Event], None]


class Ears:
    """Who wants to hear of which events: all that have `observe`, of those kinds that `hears` names, if it does."""

    def __init__(self, learners: Iterable[object], log: Log) -> None:
        self._log = log
        kinds = get_args(Event)
        self._hearing: dict[type, tuple[Emit, ...]] = dict.fromkeys(kinds, ())
        for learner in learners:
            observe = getattr(learner, "observe", None)
            if observe is not None:
                for kind in getattr(learner, "hears", kinds):
                    self._hearing[kind] += (observe,)

    def emitter(self, *kinds: type) -> Emit:
        """Where events of these kinds go: straight into the log if nobody wants to hear of them."""
        if any(self._hearing[kind] for kind in kinds or self._hearing):
            return self._emit
        return self._log.emit

    def _emit(self, event: Event) -> None:
        self._log.emit(event)
        for observe in self._hearing[type(event)]:
            observe(event)


@dataclass(slots=True)
class Parts:
    """One per replica.

    emit_step: as `emit`, for Stepped and Completed, which are most events and which few want to hear.
    names_ahead: full blocks get their names when they are planned; else when they are written.
    numbers: of transfers.
    step_s: what the last step took. num_drafted, num_right: guesses that were verified so far, and the right ones.
    """

    name: str
    ledger: BlockLedger
    roster: Roster
    briefing: Briefing
    executor: Executor
    swap: Swap | None
    emit: Emit
    emit_step: Emit
    names_ahead: bool
    step_s: float = 0.0
    num_drafted: int = 0
    num_right: int = 0
    tiers: Tiers | None = None
    seeks: Seeks | None = None
    numbers: Iterator[int] = field(default_factory=count)

    @property
    def drafts(self) -> tuple[int, int] | UnsetType:
        """For reports."""
        return (self.num_drafted, self.num_right) if self.num_drafted else UNSET

    def copied_blocks(self) -> set[int]:
        """Device blocks that something is being copied from or to beside the steps, or is about to be."""
        found = set() if self.swap is None else self.swap.copied()
        return found if self.tiers is None else found | self.tiers.copied()

    def finish(
        self,
        now: float,
        job: Job,
        reason: FinishReason,
        sampled: Sampled = NOTHING,
        error: str | None = None,
        code: str | None = None,
    ) -> None:
        """End one answer, wherever it stands."""
        self.briefing.ended(job)
        self.roster.finish(now, job, reason, sampled, error, code)
        self._forget_copies(job)

    def _forget_copies(self, job: Job) -> None:
        if self.swap is not None:
            self.swap.forget(job.seq)
        if self.tiers is not None:
            self.tiers.forget(job.seq)
        if self.seeks is not None:
            self.seeks.forget(job)
        if self.roster.images.jobs:
            self.roster.images.forget(job.seq)

    def forget(self, now: float, job: Job) -> None:
        """It goes on elsewhere, or never began here: its caller is not told."""
        self.briefing.ended(job)
        self.roster.let_go(job)
        self._forget_copies(job)
        self.emit(Departed(at=now, who=self.name, request=job.request.id, seq=job.seq))
