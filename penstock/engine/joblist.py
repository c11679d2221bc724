"""Jobs in order, with their columns: arrays over the same jobs for policies that rank thousands of them.

The arrays are made the first time somebody asks and kept across steps from then on: a job that arrives is written
behind the others, one that leaves is cut out, so a queue of thousands costs nothing per step but memory moves. Columns
that change while a job runs (num_output, known, computed, todo, the next deadline) are read again at each call for
running jobs; those of waiting jobs do not change.

Tenants are numbered as they come; numbers of tenants without jobs are taken back when there are too many of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

import numpy as np
from numpy.typing import NDArray

from penstock.core.types import Job
from penstock.policy.order import deadline_at

FIXED = (
    "seq", "priority", "arrived_at", "num_prompt", "max_tokens", "last_at", "tenant",
)  # fmt: skip
LIVE = ("num_output", "known", "computed", "todo", "deadline_at")
PLACES = {name: place for place, name in enumerate((*FIXED, *LIVE))}
MARGIN = 64  # rows made at least at either end when there is no room for one more
MOST_TENANTS = 1024  # numbers of tenants without jobs that are kept


def _live(job: Job) -> tuple[float, ...]:
    return job.num_output, job.known, job.computed, job.todo, deadline_at(job)


class JobColumns:
    """One table [columns, jobs] of float64; see penstock.core.views.Columns."""

    __slots__ = ("_table",)

    def __init__(self, table: NDArray[np.float64]) -> None:
        self._table = table

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self._table[PLACES[name]]
        return found

    def __len__(self) -> int:
        return int(self._table.shape[1])


class JobList:
    """An ordered list of jobs. `is_live`: their progress changes while they are in it."""

    def __init__(self, *, is_live: bool) -> None:
        self.jobs: list[Job] = []
        self._is_live = is_live
        self._table: NDArray[np.float64] | None = None  # with rows to spare before and behind
        self._first = 0
        self._tenants: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)

    def append(self, job: Job) -> None:
        self.jobs.append(job)
        if self._table is not None:
            place = self._first + len(self.jobs) - 1
            if place == self._table.shape[1]:
                place += self._widen(len(self.jobs) - 1)
            self._table[:, place] = self._row(job)

    def push_front(self, job: Job) -> None:
        self.jobs.insert(0, job)
        if self._table is not None:
            if self._first == 0:
                self._widen(len(self.jobs) - 1)
            self._first -= 1
            self._table[:, self._first] = self._row(job)

    def remove(self, job: Job) -> None:
        place = self.jobs.index(job)
        del self.jobs[place]
        table, first = self._table, self._first
        if table is None:
            return
        if 2 * place < len(self.jobs):
            table[:, first + 1 : first + place + 1] = table[:, first : first + place]
            self._first += 1
        else:
            end = first + len(self.jobs)
            table[:, first + place : end] = table[:, first + place + 1 : end + 1]

    def columns(self) -> JobColumns:
        table, first, num = self._table, self._first, len(self.jobs)
        if table is None:
            rows = np.array([self._row(job) for job in self.jobs], dtype=np.float64)
            table = self._table = np.ascontiguousarray(rows.reshape(-1, len(PLACES)).T)
            first = self._first = 0
        elif self._is_live and num:
            told = table[len(FIXED) :, first : first + num]
            told[:] = np.array([_live(job) for job in self.jobs], dtype=np.float64).T
        if len(self._tenants) > 2 * num + MOST_TENANTS:
            self._tenants.clear()
            numbers = [self._number(job) for job in self.jobs]
            table[PLACES["tenant"], first : first + num] = numbers
        return JobColumns(table[:, first : first + num])

    def _widen(self, num: int) -> int:
        """Make room at both ends of a table with `num` rows; how far these moved."""
        assert self._table is not None
        before, first = self._table, MARGIN + num // 4
        self._table = np.zeros((len(PLACES), 2 * first + num))
        self._table[:, first : first + num] = before[:, self._first : self._first + num]
        moved, self._first = first - self._first, first
        return moved

    def _number(self, job: Job) -> int:
        return self._tenants.setdefault(job.request.tenant, len(self._tenants))

    def _row(self, job: Job) -> tuple[float, ...]:
        bound = job.request.slo.deadline_s
        return (
            job.seq,
            job.priority,
            job.arrived_at,
            job.num_prompt,
            job.max_tokens,
            inf if bound is None else job.arrived_at + bound,
            self._number(job),
            *_live(job),
        )
