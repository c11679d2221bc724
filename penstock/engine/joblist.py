"""Jobs in order, with their columns: arrays over the same jobs for policies that rank thousands of them.

The arrays are made the first time somebody asks and kept across steps from then on: a job that arrives is appended,
one that leaves is cut out, so a queue of thousands costs nothing per step but memory moves. Columns that change while
a job runs (num_output, known, computed, todo, the next deadline) are read again at each call for running jobs; those
of waiting jobs do not change.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from penstock.core.types import Job
from penstock.policy.order import deadline_at

FIXED = ("seq", "priority", "arrived_at", "num_prompt", "max_tokens")
LIVE = ("num_output", "known", "computed", "todo", "deadline_at")


def _row(job: Job) -> list[float]:
    return [
        job.seq,
        job.priority,
        job.arrived_at,
        job.num_prompt,
        job.max_tokens,
        *_live(job),
    ]


def _live(job: Job) -> tuple[float, ...]:
    return job.num_output, job.known, job.computed, job.todo, deadline_at(job)


class JobColumns:
    """One table [jobs, columns] of float64; see penstock.core.views.Columns."""

    def __init__(self, rows: NDArray[np.float64]) -> None:
        self._rows = rows

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self._rows[:, (*FIXED, *LIVE).index(name)]

    def __len__(self) -> int:
        return len(self._rows)


class JobList:
    """An ordered list of jobs. `is_live`: their progress changes while they are in it."""

    def __init__(self, *, is_live: bool) -> None:
        self.jobs: list[Job] = []
        self._is_live = is_live
        self._rows: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)

    def append(self, job: Job) -> None:
        self.jobs.append(job)
        if self._rows is not None:
            self._rows = np.concatenate((self._rows, [_row(job)]))

    def push_front(self, job: Job) -> None:
        self.jobs.insert(0, job)
        if self._rows is not None:
            self._rows = np.concatenate(([_row(job)], self._rows))

    def remove(self, job: Job) -> None:
        place = self.jobs.index(job)
        del self.jobs[place]
        if self._rows is not None:
            self._rows = np.delete(self._rows, place, axis=0)

    def columns(self) -> JobColumns:
        if self._rows is None:
            width = len(FIXED) + len(LIVE)
            self._rows = np.array([_row(job) for job in self.jobs], dtype=np.float64).reshape(
                -1, width
            )
        elif self._is_live and self.jobs:
            self._rows[:, len(FIXED) :] = [_live(job) for job in self.jobs]
        return JobColumns(self._rows)
