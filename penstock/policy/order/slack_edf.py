"""Earliest deadline first among the jobs that can still make it; the others behind them.

Source: S-EDF of FlowPrefill (HSIEHCHIACHI/FlowPrefill, commit 1ca0fec), a prefill scheduler on vLLM 0.11.

Idea: plain EDF beyond saturation serves the hopeless first and so makes everybody late. Predict how long a job
still needs; one whose slack is negative cannot keep its promise any more and is demoted.

    slack(job)    = deadline(job) - now - remaining(job)
    priority(job) = sign(slack) / deadline, highest first

so: feasible jobs by earliest deadline, then jobs without a promise, then the demoted, latest deadline first.

    remaining = predict(all todo tokens as one chunk), and where the promise is the last token's (deadline_s) besides
                (output expected - output so far - 1) * predict(the job's last token alone)
    deadline  = see penstock.policy.order.deadline_at

Parameters
    quantile    of the output length to plan for under deadline_s, in (0, 1), default 0.5; longer demotes sooner
    margin_s    slack under which a job is demoted, seconds, default 0 (the paper's)

Where we differ: the paper promises first tokens only and fits a polynomial of the prompt length; we ask the cost model.
It re-ranks running jobs too and interrupts them; this file ranks those who wait. Parts of a prompt found in the
prefix cache count as work. Beyond 64 waiting jobs predictions are interpolated between 33 jobs spread over the sizes,
those of single tokens between the two ends. Lengths are asked for at each decision, of all jobs promised by their last
token: with history by trait (`by` of the table lengths) that is a microsecond or two for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from penstock.core.views import Chunk, Columns, JobView
from penstock.policy.order import FEW, STABLE, Decision, View, in_order
from penstock.policy.order.sizes import prefill_s, prefills_s


@dataclass(slots=True)
class SlackEdf:
    quantile: float = 0.5
    margin_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must be in (0, 1), got {self.quantile}")
        if self.margin_s < 0:
            raise ValueError(f"margin_s must not be negative, got {self.margin_s}")

    def decide(self, view: View) -> Decision:
        waiting = view.waiting
        if len(waiting) < 2:
            return Decision(waiting, stable_for=STABLE)
        columns = view.columns()
        deadlines = columns["deadline_at"]
        if len(waiting) <= FEW:
            seconds = np.array([prefill_s(view, job) for job in waiting])
        else:
            seconds = prefills_s(view, columns["todo"])
        slack = deadlines - view.now - seconds - self._answer_s(view, columns)
        ranks, num_demoted = rank(deadlines, slack, self.margin_s)
        return Decision(in_order(waiting, ranks), f"{num_demoted} demoted" if num_demoted else "")

    def _answer_s(self, view: View, columns: Columns) -> float | NDArray[np.float64]:
        """Seconds of the tokens after the next one, for jobs whose nearest promise is the last token's."""
        last_at = columns["last_at"]
        places = np.flatnonzero((last_at < inf) & (last_at <= columns["deadline_at"]))
        if not len(places):
            return 0.0
        jobs = [view.waiting[place] for place in places.tolist()]
        lengths = np.array(view.lengths.quantiles(jobs, self.quantile), dtype=np.float64)
        lengths = np.minimum(lengths, columns["max_tokens"][places])
        rests = np.maximum(0.0, lengths - columns["num_output"][places] - 1)
        seconds = np.zeros(len(view.waiting))
        seconds[places] = rests * decode_s(view, jobs, columns["known"][places])
        return seconds


def decode_s(
    view: View, jobs: Sequence[JobView], contexts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Seconds of one token of each job alone; of many, on a line between the least context and the most."""
    if len(jobs) <= FEW:
        return np.array([view.cost.predict((Chunk(job, 1),)) for job in jobs])
    ends = [int(contexts.argmin()), int(contexts.argmax())]
    known = [view.cost.predict((Chunk(jobs[place], 1),)) for place in ends]
    line: NDArray[np.float64] = np.interp(contexts, contexts[ends], known)
    return line


def rank(
    deadlines: NDArray[np.float64], slack: NDArray[np.float64], margin_s: float
) -> tuple[NDArray[np.intp], int]:
    """Places in order of service, and how many were demoted. Equals keep their order."""
    is_demoted = slack < margin_s  # never those without a promise: their slack is infinite
    key = np.where(is_demoted, -deadlines, deadlines)
    return np.lexsort((key, is_demoted)), int(is_demoted.sum())
