"""Preempt the job of lowest standing, and compute it again later.

Source: vLLM v1 priority preemption (vllm 0.33, v1/core/sched/scheduler.py: the victim is the running request with the
largest (priority, arrival time)).

Idea: with priorities the place in the running list says little, so the victim is the one who matters least: the
largest priority number, and among equals the latest to arrive. The asker competes like all others: when it is the
least itself, it gives up.

Parameters: none.

Where we differ: equal priority and arrival go by the larger arrival number, so that the choice is always the same.
Asked about cached blocks (no asker) it takes them as offered, the longest unused first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from penstock.core.views import JobView
from penstock.policy.evict import Decision, View, take


def standing(job: JobView) -> tuple[int, float, int]:
    return job.priority, job.arrived_at, job.seq


@dataclass(slots=True)
class RecomputePriority:
    def decide(self, view: View) -> Decision:
        if view.asker is None:
            return take(view, view.items)
        jobs = cast(Iterable[JobView], view.items)
        ranked = sorted(jobs, key=standing, reverse=True)
        return take(view, ranked, stops_at_asker=True)
