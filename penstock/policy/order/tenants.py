"""Who asked, who waits, who was served: the books of the fair orders, kept from the events of their replica.

A tenant is *backlogged* while at least one of its jobs waits. Service is counted in weighted tokens: a job's prompt
when it is admitted for the first time (what a preempted job computes again is not its tenant's doing), every token of
its answer as it comes.

A job that comes from another replica with its blocks does not wait here, and what it was admitted for there is not
charged again; one that leaves is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from penstock.core.events import Arrived, Completed, Event, Finished, Stepped
from penstock.core.moving import Departed, Took
from penstock.core.views import JobView
from penstock.policy.order import View, num_returned

SHORT = 1 << 16


@dataclass(slots=True)
class Lines:
    """The waiting jobs as one line a tenant. `owner`: place in `tenants` of each job's; `charge`: what admitting it
    will cost; `ahead`: what admitting those of its own tenant before it will.
    """

    seqs: NDArray[np.float64]
    returned: int
    tenants: list[str]
    owner: NDArray[np.intp]
    charge: NDArray[np.float64]
    ahead: NDArray[np.float64]


@dataclass(slots=True)
class Asked:
    """One job that has not ended."""

    tenant: str
    num_prompt: int
    is_waiting: bool = True
    is_charged: bool = False


@dataclass(slots=True)
class Books:
    """`returns(tenant)` is called when a tenant without waiting jobs gets one, before that counts;
    `prompts(tenant, tokens)` and `outputs(tenant, tokens)` for service it gets, in weighted tokens.
    """

    returns: Callable[[str], None]
    prompts: Callable[[str, float], None]
    outputs: Callable[[str, float], None]
    prompt_weight: float
    output_weight: float
    num_waiting: dict[str, int] = field(default_factory=dict)  # of backlogged tenants alone
    last_served: str | None = None  # whose job was the last to stop waiting
    _jobs: dict[int, Asked] = field(default_factory=dict)
    _firsts: dict[str, tuple[int, int]] = field(default_factory=dict)  # seq, answers left
    _lines: Lines | None = None  # of the call before

    def hear(self, event: Event) -> None:
        if isinstance(event, Completed):
            self._hear_tokens(event)
        elif isinstance(event, Stepped):
            for seq in event.evicted:
                self._enter(seq)
            for seq in event.admitted:
                self._admit(seq)
        elif isinstance(event, Arrived):
            self._firsts[event.request] = event.seq, event.n
            for seq in range(event.seq, event.seq + event.n):
                self._jobs[seq] = Asked(event.tenant, event.num_prompt, is_waiting=False)
                if event.move is UNSET:
                    self._enter(seq)
        elif isinstance(event, Took):
            self._take(event)
        elif isinstance(event, Finished):
            self._end(event.request, event.answer)
        elif isinstance(event, Departed):
            self._end(event.request, 0)

    def lines(self, view: View) -> Lines:
        """The lines of this view; those of the call before where nobody came or went since."""
        lines, returned = self._lines, num_returned(view.waiting)
        seqs = view.columns()["seq"]
        if lines is None or returned != lines.returned or not np.array_equal(seqs, lines.seqs):
            lines = self._lines = lines_of(view, returned, self.prompt_weight)
        return lines

    def tenants(self) -> set[str]:
        """Those with jobs that have not ended."""
        return {job.tenant for job in self._jobs.values()}

    def _enter(self, seq: int) -> None:
        job = self._jobs.get(seq)
        if job is None or job.is_waiting:
            return
        if job.tenant not in self.num_waiting:
            self.returns(job.tenant)
        self.num_waiting[job.tenant] = self.num_waiting.get(job.tenant, 0) + 1
        job.is_waiting = True

    def _leave(self, job: Asked) -> None:
        if not job.is_waiting:
            return
        job.is_waiting = False
        self.last_served = job.tenant
        left = self.num_waiting[job.tenant] - 1
        if left:
            self.num_waiting[job.tenant] = left
        else:
            del self.num_waiting[job.tenant]

    def _admit(self, seq: int) -> None:
        job = self._jobs.get(seq)
        if job is None:
            return
        self._leave(job)
        if not job.is_charged:
            job.is_charged = True
            self.prompts(job.tenant, self.prompt_weight * job.num_prompt)

    def _take(self, event: Took) -> None:
        """What a job that comes has been charged for, and whether it will wait."""
        known = self._firsts.get(event.request)
        if known is None:  # of a movement that was dropped
            return
        seq, _ = known
        self._jobs[seq].is_charged = event.admitted_age_s is not None
        if event.is_last and not event.computed:
            self._enter(seq)

    def _hear_tokens(self, event: Completed) -> None:
        tokens_of: dict[str, int] = {}
        jobs = self._jobs
        for seq, tokens, _, _ in event.outputs:
            job = jobs.get(seq)
            if job is not None and tokens:
                tokens_of[job.tenant] = tokens_of.get(job.tenant, 0) + tokens
        for tenant, tokens in tokens_of.items():
            self.outputs(tenant, self.output_weight * tokens)

    def _end(self, request: str, answer: int) -> None:
        first, left = self._firsts.get(request, (None, 0))
        if first is None:
            return
        job = self._jobs.pop(first + answer, None)
        if job is not None:
            self._leave(job)
        if left > 1:
            self._firsts[request] = first, left - 1
        else:
            del self._firsts[request]


def lines_of(view: View, returned: int, prompt_weight: float) -> Lines:
    """`returned`: how many were preempted; these have been charged already."""
    waiting: Sequence[JobView] = view.waiting
    columns = view.columns()
    numbers = columns["tenant"].astype(np.intp)
    short = numbers.astype(np.uint16)  # sorted by digits, which is some times faster
    by_owner = np.argsort(short if numbers.max(initial=0) < SHORT else numbers, kind="stable")
    charge = prompt_weight * columns["num_prompt"]
    charge[:returned] = 0.0
    ordered = charge[by_owner]
    ahead = np.cumsum(ordered) - ordered
    begins = np.diff(numbers[by_owner], prepend=-1) > 0
    starts = np.flatnonzero(begins)
    ahead -= np.repeat(ahead[starts], np.diff(starts, append=len(numbers)))
    owner, found = np.empty_like(by_owner), np.empty_like(ahead)
    owner[by_owner] = np.cumsum(begins) - 1
    found[by_owner] = ahead
    tenants = [waiting[place].request.tenant for place in by_owner[starts].tolist()]
    return Lines(columns["seq"].copy(), returned, tenants, owner, charge, found)


def check_weights(prompt_weight: float, output_weight: float, shares: dict[str, float]) -> None:
    """Raise ValueError for weights that no service can be counted with."""
    if prompt_weight < 0 or output_weight < 0 or prompt_weight + output_weight <= 0:
        raise ValueError("prompt_weight and output_weight must not be negative, nor both 0")
    for tenant, share in shares.items():
        if not share > 0:
            raise ValueError(f"shares.{tenant} must be positive, got {share}")
