"""Preempt the latest admitted job, and compute it again later.

Source: vLLM v1 FCFS preemption (vllm 0.33, v1/core/sched/scheduler.py: the victim is the last of `running`).

Idea: running jobs stand in the order of admission. The last one has waited least and has least to lose, so it
leaves first, then the one before it, until enough is free. The asker is one of them: when its turn comes it gives
up itself, and nobody admitted before it is harmed.

Parameters: none.

Where we differ: nothing; what the victim had computed may survive in the prefix cache, as there. Asked about
cached blocks (no asker) it takes them as offered, the longest unused first.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.policy.evict import Decision, View, take


@dataclass(slots=True)
class RecomputeLast:
    def decide(self, view: View) -> Decision:
        if view.asker is None:
            return take(view, view.items)
        return take(view, reversed(list(view.items)), stops_at_asker=True)
