"""Start a job while the bandwidth that all need to be in time suffices, and its prompt fits in memory.

Source: JITServe (UIUC-MLSys/JITServe): a request is given the share of the engine that it needs to end just in time.

Idea: a batch that serves all running jobs in every step takes in what would make all of them late, unless somebody
adds up. Each job needs a share of one place (see penstock.policy.bandwidth); a newcomer waits while its share does not
fit beside those of the running. A job that cannot be in time any more needs nothing: it may start while places are
free, and so does every job without a promise.

    yes    need(job, known) <= free, and nothing runs or sum of bandwidth(running) + bandwidth(job) <= slots
    no     blocks(num_prompt + max_tokens - 1) > total
    later  otherwise; who was refused is judged again after `every_steps` steps, or when others run

Parameters
    slots         places of one step, default 256
    quantile      of the length that bandwidth is for, in (0, 1), default 0.95
    usual         of the length that chances are judged by, default 0.5
    renew_tokens  tokens of an answer after which its length is asked for again, default 50
    step_tokens   prompt tokens that a step computes, default 512
    every_steps   steps for which a refusal stands, default 10

Where we differ: the source reserves where it forms batches (every 50 steps), as batch jit does here, where this policy
is not needed; it brings the same rule to batches that serve whoever runs. Nothing is known here of agent runs: each
call counts with its own deadline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from penstock.core.events import Completed, Event
from penstock.core.views import NO_PROGRAMS, JobView, Lengths, Programs
from penstock.policy.admit import Decision, View, cannot_start
from penstock.policy.bandwidth import HOPELESS, Docket, Progress


@dataclass(slots=True)
class Asking:
    """What a docket asks of a view."""

    now: float
    lengths: Lengths
    programs: Programs = NO_PROGRAMS


@dataclass(slots=True)
class JitBandwidth:
    slots: int = 256
    quantile: float = 0.95
    usual: float = 0.5
    renew_tokens: int = 50
    step_tokens: int = 512
    every_steps: int = 10
    _docket: Docket = field(init=False, repr=False, compare=False)
    _taken: float = field(init=False, default=0.0, repr=False)  # by the running and those admitted
    _step: tuple[float, int] | None = field(init=False, default=None, repr=False)
    _steps: int = field(init=False, default=0, repr=False)  # that have ended
    _next: int = field(init=False, default=0, repr=False)  # so many have when a refusal ends
    _refused: tuple[int, ...] = field(init=False, default=(), repr=False)  # whom, beside whom
    _why: str = field(init=False, default="", repr=False)

    def __post_init__(self) -> None:
        for name in ("slots", "every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self._docket = Docket(self.quantile, self.usual, self.renew_tokens, self.step_tokens)

    def observe(self, event: Event) -> None:
        self._docket.observe(event)
        if isinstance(event, Completed):
            self._steps += event.steps_run

    def decide(self, view: View) -> Decision:
        job = view.job
        refusal = cannot_start(view)
        if refusal is not None:
            return refusal
        beside = (job.seq, len(view.running), *(each.seq for each in view.running[-1:]))
        if beside == self._refused and self._steps < self._next:
            return Decision("later", self._why, self._next - self._steps)
        step = view.now, len(view.running)
        if step != self._step:
            self._step, self._taken = step, self._bandwidth(view, view.running)
        share = self._bandwidth(view, (job,))
        if view.running and self._taken + share > self.slots:
            self._why = f"{self._taken:.1f} of {self.slots} places are taken"
            self._refused, self._next = beside, self._steps + self.every_steps
            return Decision("later", self._why, self.every_steps)
        self._taken += share
        return Decision("yes")

    def _bandwidth(self, view: View, jobs: Sequence[JobView]) -> float:
        """Of jobs that can still be in time."""
        if not jobs:
            return 0.0
        needs = self._docket.needs(Asking(view.now, view.lengths), jobs, Progress.of(jobs))
        shares = np.minimum(needs.bandwidth, 1.0)
        return float(shares[needs.worth > HOPELESS].sum())
