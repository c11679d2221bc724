"""Nobody starts who would be late already: a prompt whose first token cannot keep its promise is refused.

Source: P/D-Serve (2024) fails early whom it cannot serve in time; textbook deadline shedding.

Idea: under a burst everybody waits a little longer than promised, and all that work is worth nothing. Whoever is late
anyway is refused before any of it is done, so that the next one is not late too.

    no      arrived_at + promised TTFT < now + seconds until the prompt is computed, at `token_s` a token and `fixed_s`
    later   all that the request knows does not fit in memory now
    yes     otherwise; and always for jobs without a promise, or with a token already

Parameters
    token_s   seconds a prompt token takes, default 0: late is who is late without any work
    square_s  seconds for each square of tokens, default 0
    fixed_s   seconds that a step takes beside its tokens, default 0

Where we differ: the source compares in its gateway; here a replica does, where the wait is known.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.policy.admit import Decision, View, can_ever_fit


@dataclass(slots=True)
class InTime:
    token_s: float = 0.0
    square_s: float = 0.0
    fixed_s: float = 0.0

    def __post_init__(self) -> None:
        if min(self.token_s, self.square_s, self.fixed_s) < 0:
            raise ValueError("seconds cannot be negative")

    def decide(self, view: View) -> Decision:
        ledger, job = view.ledger, view.job
        if not can_ever_fit(job, ledger):
            return Decision("no", "can outgrow the whole memory")
        promise = job.request.slo.ttft_s
        if promise is not None and not job.num_output:
            tokens = job.known - ledger.cached(job)
            needs_s = self.fixed_s + self.token_s * tokens + self.square_s * tokens**2
            if view.now + needs_s > job.arrived_at + promise:
                return Decision("no", "its first token would be late")
        need, free = ledger.need(job, job.known), ledger.free
        if need > free:
            return Decision("later", f"needs {need} blocks, {free} free")
        return Decision("yes")
