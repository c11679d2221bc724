"""vLLM's steps, and whoever is ranked first is in memory.

Source: FastSwitch's scheduling (the requests of highest priority that fit are resident), on vLLM v1's rules for a step
(penstock.policy.batch.vllm_v1).

Idea: where priorities change, a job that waits may matter more than one that runs. Before each step those who wait ask,
in their order, for room: the evict policy offers running jobs that matter less, or says that the asker itself matters
least, which ends the asking.

    for a waiting job   blocks for all it knows, beside those of the waiting jobs before it
    offered             running jobs that have written a token since they came in, so that everybody ends some time
    then                vLLM v1's walk over the running, and over the waiting unless a running job had to leave for
                        another running one

Parameters: max_tokens, max_jobs, long_prefill_tokens, is_chunked, stops_on_self and is_ahead as in vllm-v1. Use an
evict policy that lets the asker compete, such as fastswitch or recompute-priority, with the order that ranks alike.

Where we differ: jobs that leave may go to host memory and come back (penstock.engine.swap); with is_ahead the late are
still asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.views import JobView
from penstock.policy.batch import Decision, View
from penstock.policy.batch.vllm_v1 import Draft, VllmV1, columns_first, decided, drop


@dataclass(slots=True)
class Resident(VllmV1):
    _written: dict[int, int] = field(init=False, default_factory=dict, repr=False)

    def decide(self, view: View) -> Decision:
        if view.busy_lanes:
            return Decision(why="the lane is busy")
        has_both = view.waiting and view.running
        decision = self._step(view) if has_both else VllmV1.decide(self, view)
        if decision.admitted:
            written = self._written
            self._written = {
                job.seq: written[job.seq] for job in view.running if job.seq in written
            }
            self._written |= {job.seq: job.num_output for job in decision.admitted}
        return decision

    def _has_written(self, job: JobView) -> bool:
        """Since it came in."""
        return job.num_output > self._written.get(job.seq, -1)

    def _step(self, view: View) -> Decision:
        budget = min(self.max_tokens, view.caps.max_batch_tokens)
        draft = Draft(view.ledger.fork(), budget)
        self._claim(view, draft)
        num_claimed = len(draft.gone)
        self._walk_running(view, draft)
        slots = min(self.max_jobs, view.caps.max_jobs) - len(view.running) + len(draft.gone)
        if len(draft.gone) == num_claimed and slots > 0:
            self._walk_waiting(view, draft, slots)
        self._last_at = view.now
        self._slots = len(view.running) + len(draft.admitted) - len(draft.gone)
        return decided(draft, columns_first(draft) if draft.planned else ())

    def _claim(self, view: View, draft: Draft) -> None:
        """Have running jobs leave for waiting ones that matter more."""
        fork, wanted = draft.fork, 0
        slots = min(self.max_jobs, view.caps.max_jobs) - len(view.running)
        tokens_left = draft.budget - len(view.running)
        for job in view.waiting:
            if tokens_left < 1:
                return
            wanted += fork.need(job, job.known)
            need = max(wanted - fork.free, int(slots < 1))
            if need > 0:
                among = [
                    other
                    for other in view.running
                    if other.seq not in draft.gone
                    and not other.in_flight
                    and self._has_written(other)
                ]
                victims = view.victims(job, need, [*among, job], fork)
                if not victims or any(one.item.seq == job.seq for one in victims):
                    return
                for eviction in victims:
                    drop(draft, eviction)
                    slots += 1
                if wanted > fork.free:
                    return
            slots -= 1
            tokens_left -= job.known - fork.cached(job)
