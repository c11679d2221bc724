"""Lower priority numbers first, the earlier arrival among equals.

Source: the priority request queue of vLLM v1 (vllm 0.33, v1/core/sched/request_queue.py: a heap on (priority, arrival
time, id)).

Idea: the caller says how much a request matters; within one priority it is first come, first served. A preempted
job returns to the place its arrival gives it and not to the head.

Parameters: none. `Request.priority` is 0 unless the caller sets it.

Where we differ: equal arrivals go by arrival number. Nothing ages: a steady stream of urgent work starves the rest,
as there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.core.views import JobView
from penstock.policy.order import FEW, STABLE, Decision, View, in_order


def place(job: JobView) -> tuple[int, float, int]:
    return job.priority, job.arrived_at, job.seq


@dataclass(slots=True)
class Priority:
    def decide(self, view: View) -> Decision:
        waiting = view.waiting
        if len(waiting) <= FEW:
            return Decision(sorted(waiting, key=place), stable_for=STABLE)
        columns = view.columns()
        ranks = np.lexsort((columns["seq"], columns["arrived_at"], columns["priority"]))
        return Decision(in_order(waiting, ranks), stable_for=STABLE)
