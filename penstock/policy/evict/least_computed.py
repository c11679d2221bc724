"""Preempt the job that has computed least.

Source: own. The victim rule of "first in, most to lose"; vLLM's last-in rule comes close where prompts are alike.

Idea: all that a preempted job has computed must be computed again. The youngest job is a good guess at the one that
has least; a long prompt admitted last is the costliest of mistakes. So look at the positions themselves.

    leaves first    fewest computed positions; equals by the later arrival

The asker competes like all others: when its turn comes it gives up, alone, and nobody else has to leave.

Parameters: none.

Where we differ: nothing to differ from. The job with most computed positions never leaves for another one, so
somebody always gets on. Asked about cached blocks (no asker) it takes them as offered, the longest unused first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from penstock.core.views import JobView
from penstock.policy.evict import Decision, View, take, take_or_give_up


def progress(job: JobView) -> tuple[int, int]:
    return job.computed, -job.seq


@dataclass(slots=True)
class LeastComputed:
    def decide(self, view: View) -> Decision:
        if view.asker is None:
            return take(view, view.items)
        jobs = cast(Iterable[JobView], view.items)
        ranked = sorted(jobs, key=progress)
        return take_or_give_up(view, ranked)
