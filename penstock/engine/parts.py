"""What the pieces of one replica share: its jobs, their blocks, what the executor was told, and who hears of events.

replica    what others call, the inbox, the order of a turn
flights    plans that run or are suspended
outcomes   what came back from the executor changes jobs
launch     what the policies decided becomes evictions, admissions and plans
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.events import Event
from penstock.core.plans import Sampled
from penstock.core.ports import Executor
from penstock.core.types import FinishReason, Job
from penstock.engine.briefing import Briefing
from penstock.engine.ledger import BlockLedger
from penstock.engine.roster import NOTHING, Roster
from penstock.engine.swap import Swap


@dataclass(slots=True)
class Parts:
    """One per replica.

    names_ahead: full blocks get their names when they are planned; else when they are written.
    step_s: what the last step took.
    """

    name: str
    ledger: BlockLedger
    roster: Roster
    briefing: Briefing
    executor: Executor
    swap: Swap | None
    emit: Callable[[Event], None]
    names_ahead: bool
    step_s: float = 0.0

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
        if self.swap is not None:
            self.swap.forget(job.seq)
