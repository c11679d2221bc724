"""Start a job when the memory at the worst moment to come suffices, by lengths drawn from those of recent answers.

Source: Past-Future scheduler (LightLLM; WuSiYu/lightllm-ae, commit d93ff69, FuturePastReqQueue).

Idea: what running jobs hold now says little about what they will hold. Draw a length for each from the recent answers
that were longer than it is already (the past), find the most memory the batch comes to hold as its jobs end one after
the other (the future), and admit while that fits. Few jobs make a chancy sum, so then several sets are drawn and all
must fit.

    length(j)   view.lengths.sample(j, u), u uniform: new for every running job, set and step
    sets        min(max_sets, min_draws // running + 1)
    yes         peak(running, job; lengths) < (1 - reserve) * total in every set, and need(job, known) <= free,
                or nothing runs and need(job, known) <= free
    no          blocks(num_prompt + max_tokens - 1) > total
    later       otherwise; then there is no attempt for `every_steps` steps

See penstock.policy.admit.peak for the peak, and penstock.cost.lengths for the distribution: a window of 1,000 answers
unless the fleet's table `lengths` says otherwise (seeds = 500 is the source's cold start).

Parameters
    reserve       share of all blocks that stays free of promises, default 0.03 (their simulations; their server 0.05)
    min_draws     jobs times sets, at least, default 200
    max_sets      default 5
    every_steps   steps of the replica from a refusal to the next attempt, default 2 (their server; their simulations
                  10). Each attempt draws anew and a lucky one suffices, so fewer steps admit more than the reserve
                  would have it

Where we differ: memory is counted in blocks, and blocks that several jobs hold are counted once. A preempted job's
length is drawn given what it has written already. Attempts are spaced after refusals alone: a token budget may split
what they prefill at once over several steps. A job whose prompt is not computed yet grows from now on in the peak.
While the job's prompt does not fit anyway, nothing is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from penstock.core.events import Completed, Event
from penstock.policy.admit import Decision, View, cannot_start
from penstock.policy.admit.peak import Crowd, Guess, left_of


@dataclass(slots=True)
class PastFuture:
    hears: ClassVar = (Completed,)
    reserve: float = 0.03
    min_draws: int = 200
    max_sets: int = 5
    every_steps: int = 2
    _crowd: Crowd | None = field(init=False, default=None, repr=False)
    _at: float = field(init=False, default=0.0, repr=False)  # the instant of the crowd
    _steps: int = field(init=False, default=0, repr=False)  # that have ended
    _next: int = field(init=False, default=0, repr=False)  # so many have ended at the next attempt

    def __post_init__(self) -> None:
        if not 0 <= self.reserve < 1:
            raise ValueError(f"reserve must be in [0, 1), got {self.reserve}")
        for name in ("min_draws", "max_sets", "every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def observe(self, event: Event) -> None:
        """Count steps, several of which may have run as one."""
        if isinstance(event, Completed):
            self._steps += event.steps_run

    def decide(self, view: View) -> Decision:
        ledger, job = view.ledger, view.job
        refusal = cannot_start(view)
        if refusal is not None:
            return refusal
        if view.running and self._steps < self._next:
            return Decision("later", "a job was refused just now", self._next - self._steps)
        crowd, capacity = self._crowd_of(view), (1 - self.reserve) * ledger.total
        lefts = [left_of(job, drawn_by(view)) for _ in crowd.lefts]
        if crowd.known:
            peak = crowd.peak(job, lefts)
            if peak >= capacity:
                self._next = self._steps + self.every_steps
                told = f"would peak at {peak:.0f} of {capacity:.0f} blocks"
                return Decision("later", told, self.every_steps)
        crowd.add(job, lefts)
        return Decision("yes")

    def _crowd_of(self, view: View) -> Crowd:
        """Drawn once a step: candidates of the same step are tried on the same sets."""
        crowd = self._crowd
        if crowd is None or crowd.ledger is not view.ledger or self._at != view.now:
            num = len(view.running)
            num_sets = min(self.max_sets, self.min_draws // num + 1) if num else self.max_sets
            crowd = self._crowd = Crowd.of(view.ledger, view.running, drawn_by(view), num_sets)
            self._at = view.now
        return crowd


def drawn_by(view: View) -> Guess:
    sample, random = view.lengths.sample, view.rng.random
    return lambda job: sample(job, random())
