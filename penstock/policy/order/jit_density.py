"""Dearest token first, and alike in size: JITServe's GMAX.

Source: JITServe (UIUC-MLSys/JITServe, a fork of vLLM), and readers' notes of the paper on GMAX.

Idea: give places to those whose answers earn most for the service they still need. A job that can be in time no more
earns nothing and comes last; among those that are about as dear, take a batch of similar length, since attention takes
as long as its longest.

    density   worth / work_s, see penstock.policy.bandwidth; of the calls of one agent run that wait together: the
              run's worth over the sum of their work
    rank      by (density + waited / patience_s * the middle density), highest first, then by less work
    window    of the first `spread * slots` jobs, sorted by length, the `slots` neighbours of greatest summed density
              stand first, in their order; the rest behind them

Parameters
    slots         jobs of one batch, default 256
    spread        candidates for each slot, default 2; 1 = lengths do not matter
    patience_s    seconds of waiting that add one middle density, default None (waiting adds nothing; the source blends
                  it in by an amount we could not find)
    quantile      of the length that work_s is for, in (0, 1), default 0.95
    usual         of the length that worth is for, default 0.5
    renew_tokens  tokens of an answer after which its length is asked for again, default 50
    step_tokens   prompt tokens that a step computes, default 512

Where we differ: the source weighs prompt tokens (1) beside output tokens (8) and keeps what a late request earns by its
lateness; here a deadline is kept or not, and a stream that is late earns what follows once it has caught up. It ranks
running jobs too and swaps them out: that is batch jit's part here (and it is asked each step, not every 50th: about a
millisecond with 2,000 waiting). Its cutoff against the batch's reference is not
published; the window takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from penstock.core.events import Event
from penstock.policy.bandwidth import HOPELESS, LEAST, Docket, Floats, Places, Progress
from penstock.policy.order import STABLE, Decision, View, in_order

NEAR = 1e-9


@dataclass(slots=True)
class JitDensity:
    slots: int = 256
    spread: float = 2.0
    patience_s: float | None = None
    quantile: float = 0.95
    usual: float = 0.5
    renew_tokens: int = 50
    step_tokens: int = 512
    _docket: Docket = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.slots < 1 or not self.spread >= 1:
            raise ValueError("slots and spread must be at least 1")
        if self.patience_s is not None and not self.patience_s > 0:
            raise ValueError(f"patience_s must be positive, got {self.patience_s}")
        self._docket = Docket(self.quantile, self.usual, self.renew_tokens, self.step_tokens)

    def observe(self, event: Event) -> None:
        self._docket.observe(event)

    def decide(self, view: View) -> Decision:
        waiting = view.waiting
        if len(waiting) < 2:
            return Decision(waiting, stable_for=STABLE)
        columns = view.columns()
        progress = Progress(
            columns["seq"].astype(np.intp),
            columns["num_output"],
            columns["todo"],
            self._first_at(view),
        )
        needs = self._docket.needs(view, waiting, progress)
        density = needs.worth / np.maximum(needs.usual_s, LEAST)
        if self.patience_s is not None:
            waited_s = view.now - columns["arrived_at"]
            density = density + waited_s / self.patience_s * float(np.median(density))
        # One sort in place of two: equals go by their work, and nothing else is that near.
        ranks = np.argsort(NEAR * needs.work_s - density, kind="stable")
        if self.spread > 1 and len(ranks) > self.slots:
            ranks = self._grouped(ranks, density, columns["known"])
        num_late = int((needs.worth < HOPELESS).sum())
        return Decision(
            in_order(waiting, ranks),
            f"{num_late} cannot be in time" if num_late else "",
        )

    @staticmethod
    def _first_at(view: View) -> Floats:
        """Of jobs that were preempted and stand first; nan of the others."""
        first_at = np.full(len(view.waiting), np.nan)
        for place, job in enumerate(view.waiting):
            if not job.num_preemptions:
                break
            if job.first_token_at is not None:
                first_at[place] = job.first_token_at
        return first_at

    def _grouped(self, ranks: Places, density: Floats, known: Floats) -> Places:
        """The best window of candidates first, everybody else behind it, both in the order of `ranks`."""
        num = min(len(ranks), int(self.spread * self.slots))
        candidates = ranks[:num]
        by_length = np.argsort(known[candidates], kind="stable")
        sums = np.cumsum(np.concatenate(([0.0], density[candidates][by_length])))
        start = int(np.argmax(sums[self.slots :] - sums[: -self.slots]))
        is_inside = np.zeros(num, dtype=bool)
        is_inside[by_length[start : start + self.slots]] = True
        return np.concatenate((candidates[is_inside], candidates[~is_inside], ranks[num:]))
