"""Earliest deadline first.

Source: C. Liu and J. Layland, "Scheduling Algorithms for Multiprogramming in a Hard-Real-Time Environment", J. ACM
20(1), 1973; the plain EDF baseline of FlowPrefill.

Idea: whoever must be served soonest goes first. If any order meets all deadlines on one machine whose work can be
preempted, this one does. Beyond that load it is known to fail badly (it serves the hopeless first): see slack-edf.

    deadline(job) = the earliest instant promised next, from its SLO; see penstock.policy.order.deadline_at

Parameters: none. Jobs without a promise come last, first come, first served; so do equals among themselves.

Where we differ: the textbook's jobs are periodic and its deadlines are for whole jobs; ours is the first token's
until there is one, then the mean gap's or the whole answer's. Deadlines of waiting jobs do not move.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.policy.order import FEW, STABLE, Decision, View, deadline_at, in_order


@dataclass(slots=True)
class Edf:
    def decide(self, view: View) -> Decision:
        waiting = view.waiting
        if len(waiting) <= FEW:
            return Decision(sorted(waiting, key=deadline_at), stable_for=STABLE)
        ranks = np.argsort(view.columns()["deadline_at"], kind="stable")
        return Decision(in_order(waiting, ranks), stable_for=STABLE)
