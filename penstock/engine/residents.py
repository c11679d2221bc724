"""Which adapters are resident, in which slots, and whose jobs may be scheduled.

A job whose adapter is not resident is blocked: no policy sees it, and it joins the waiting when the adapter is there.
So a step never holds more adapters than there are slots, whatever a batch policy does, and loading, which happens
beside the steps, holds up nobody else.

    resident    pinned while a job of it waits or runs; of those without jobs the longest unused leaves first
    absent      gets a free slot, or that of one without jobs; in the order in which the first blocked job of each came
    shut        where all slots are pinned, as many resident adapters as others wait for take in no more jobs, those
                resident for longest first: what they have taken in runs to its end, and newcomers queue up behind
                those who waited before them. So a stream of jobs of one adapter does not keep the others out for ever
"""

from __future__ import annotations

from collections.abc import Callable

from penstock.core.adapters import AdapterReport
from penstock.core.types import Job

Load = Callable[[str, int], None]


class Residents:
    """See the module's text. `load` begins to put an adapter into a slot; its end is told by `loaded`."""

    def __init__(self, slots: int, load: Load) -> None:
        self._load = load
        self._free = list(range(slots))[::-1]
        self._slots: dict[str, int] = {}  # resident, the one that came first in front
        self._loading: dict[str, int] = {}
        self._blocked: dict[str, list[Job]] = {}
        self._num_jobs: dict[str, int] = {}  # waiting or running, of resident ones
        self._used: dict[str, int] = {}  # when the last job ended, as a count
        self._clock = 0
        self._shut: set[str] = set()
        self.num_loads = self.num_evictions = self.num_blocked = 0

    def report(self) -> AdapterReport:
        return AdapterReport(tuple(self._slots), self.num_loads, self.num_evictions)

    def take(self, job: Job) -> bool:
        """Take in a job that came; False: it is blocked."""
        adapter = job.request.adapter
        assert adapter is not None
        if adapter in self._slots and adapter not in self._shut:
            self._num_jobs[adapter] += 1
            return True
        self._blocked.setdefault(adapter, []).append(job)
        self.num_blocked += 1
        return False

    def end(self, job: Job) -> None:
        """A job ended, wherever it stood."""
        adapter = job.request.adapter
        assert adapter is not None
        if job.status != "blocked":
            self._num_jobs[adapter] -= 1
            self._clock += 1
            self._used[adapter] = self._clock
            return
        waiting = self._blocked.get(adapter, [])
        if job in waiting:  # else its adapter could not be loaded
            waiting.remove(job)
            self.num_blocked -= 1
            if not waiting:
                del self._blocked[adapter]

    def loaded(self, adapter: str, slot: int, is_there: bool) -> list[Job]:
        """Loading has ended; the jobs that waited. Without the adapter they are to end, blocked as they are."""
        assert self._loading.pop(adapter) == slot
        jobs = self._blocked.pop(adapter, [])
        self.num_blocked -= len(jobs)
        if is_there:
            self._slots[adapter], self._num_jobs[adapter] = slot, len(jobs)
            self._used[adapter] = self._clock
            self.num_loads += 1
        else:
            self._free.append(slot)
        return jobs

    def settle(self) -> list[Job]:
        """Begin to load what there is a slot for; jobs that are blocked no longer, counted."""
        absent = [one for one in self._blocked if one not in self._slots]
        absent = [one for one in absent if one not in self._loading]
        while absent and (slot := self._slot()) is not None:
            adapter = absent.pop(0)
            self._loading[adapter] = slot
            self._load(adapter, slot)
        self._shut = set(list(self._slots)[: len(absent)])
        freed = []
        for adapter in [one for one in self._blocked if one in self._slots]:
            if adapter not in self._shut:
                ready = self._blocked.pop(adapter)
                self.num_blocked -= len(ready)
                self._num_jobs[adapter] += len(ready)
                freed += ready
        return freed

    def _slot(self) -> int | None:
        """A free one, or that of the longest unused adapter without jobs."""
        if self._free:
            return self._free.pop()
        idle = [one for one in self._slots if not self._num_jobs[one] and not self._is_wanted(one)]
        if not idle:
            return None
        adapter = min(idle, key=self._used.__getitem__)
        self.num_evictions += 1
        del self._num_jobs[adapter], self._used[adapter]
        return self._slots.pop(adapter)

    def _is_wanted(self, adapter: str) -> bool:
        """Its own jobs are blocked, and it is not shut: they are about to be taken in."""
        return adapter in self._blocked and adapter not in self._shut

    def check(self, jobs: list[Job]) -> None:
        """Recompute the invariants; `jobs` are all that wait, run or are fetched."""
        counts: dict[str, int] = dict.fromkeys(self._slots, 0)
        for job in jobs:
            if job.request.adapter is not None:
                counts[job.request.adapter] += 1  # KeyError: a job runs without its adapter
        assert counts == self._num_jobs, "jobs of an adapter were miscounted"
        taken = [*self._free, *self._slots.values(), *self._loading.values()]
        assert len(set(taken)) == len(taken), "two adapters have one slot"
        assert self.num_blocked == sum(map(len, self._blocked.values()))
