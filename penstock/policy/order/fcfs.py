"""First come, first served: the waiting jobs as they stand.

Source: the FCFS request queue of vLLM v1 (vllm 0.33, v1/core/sched/request_queue.py).

Idea: the replica keeps waiting jobs in arrival order and puts a preempted job at the head, latest preempted first.
That order already is first come, first served by admission, so the ranking is the queue itself: no sort, no copy.

Parameters: none.

Where we differ: nothing. The batch policy decides whether the head of the line blocks those behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.policy.order import STABLE, Decision, View


@dataclass(slots=True)
class Fcfs:
    def decide(self, view: View) -> Decision:
        return Decision(view.waiting, "arrival order", STABLE)
