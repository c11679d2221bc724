"""First come, first served, and whoever was preempted has come just now.

Source: the request buffer of DeepSpeed-FastGen (DeepSpeed-MII commit 8abdd98, mii/batching/ragged_batching.py): a
request whose KV was thrown out goes to the end of it.

Idea: what was preempted did not fit. Behind those who wait it does not come straight back to be thrown out again, and
they get their turn; its caller, who has seen tokens already, pays.

    place = the instant of arrival, or of the last preemption; arrivals before preemptions of the same instant

Parameters: none.

Where we differ: nothing. It hears of preemptions through its replica's events.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

from penstock.core.events import Event, Stepped
from penstock.core.views import JobView
from penstock.policy.order import STABLE, Decision, View


def arrived_at(job: JobView) -> float:
    return job.arrived_at


@dataclass(slots=True)
class Requeue:
    _left_at: dict[int, float] = field(init=False, default_factory=dict, repr=False)

    def observe(self, event: Event) -> None:
        """The jobs that were preempted, in that order, and when."""
        if not isinstance(event, Stepped):
            return
        for seq in event.evicted:
            self._left_at.pop(seq, None)
            self._left_at[seq] = event.at
        if self._left_at:
            for seq in event.admitted:
                self._left_at.pop(seq, None)

    def decide(self, view: View) -> Decision:
        left_at = self._left_at
        if not left_at:
            return Decision(view.waiting, "arrival order", STABLE)
        jobs = [job for job in view.waiting if job.seq not in left_at]
        places = {job.seq: job for job in view.waiting if job.seq in left_at}
        self._left_at = left_at = {seq: at for seq, at in left_at.items() if seq in places}
        start = 0
        for seq, at in left_at.items():
            start = bisect_right(jobs, at, start, key=arrived_at)
            jobs.insert(start, places[seq])
            start += 1
        return Decision(jobs, f"{len(places)} preempted, behind those who came before that", STABLE)
