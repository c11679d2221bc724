"""How much work waits: predicted seconds of prompts, for policies that rank by size or by slack."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.core.views import Chunk, JobView
from penstock.policy.order import View

POINTS = 33


def prefill_s(view: View, job: JobView) -> float:
    """Seconds of one step that computes all the job has left to compute."""
    return view.cost.predict((Chunk(job, job.todo),))


def prefills_s(view: View, todo: NDArray[np.float64], points: int = POINTS) -> NDArray[np.float64]:
    """The same of all waiting jobs, interpolated between jobs at evenly spread ranks of size. `todo`: the column."""
    by_size = np.argsort(todo, kind="stable")
    picks = by_size[np.linspace(0, len(todo) - 1, min(points, len(todo))).astype(int)].tolist()
    seconds = [prefill_s(view, view.waiting[i]) for i in picks]
    return np.interp(todo, todo[picks], seconds)
