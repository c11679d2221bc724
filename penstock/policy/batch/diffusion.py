"""Jobs in different phases in one step, under a budget of query tokens and one of logit rows: dLLM-Serve.

Source: "Taming the Memory Footprint Crisis" (chosen-ox/dLLM-Serve, commit aefbf0a, a scheduler on nano-vllm).

Idea: a diffusion language model computes a whole sequence in some steps and one block of it in the others. Steps of the
first kind are bound by computing, of the second by memory traffic, so they are run side by side: a job costs its whole
length in a full or refresh step, and a block in a reuse step.

    1  running jobs in the order of admission, each with the piece its frontier offers; the walk stops at the first that
       does not fit into what is left of the budgets
    2  then waiting ones in their order, as long as budgets, jobs and blocks suffice. All blocks a job will ever need
       are taken when it starts: nobody is preempted for a canvas
    3  a step's first piece may exceed the budgets, so that a long sequence is not stuck; never the executor's limit

Parameters
    max_tokens     query tokens of one step, default 16384
    max_rows       logit rows of one step, default 16384. They are computed in slices anyway (the engine's row cap)
    max_jobs       jobs running at once, default 512
    is_lockstep    nobody starts while anybody runs, default False: a static batch, what dLLM-Serve is measured against

Where we differ: jobs that write from left to right are served too (their piece is as many tokens as fit), and there
admission and victims are answers of other policies. A canvas asks neither: what it needs is known exactly.

Deciding takes about 1 ms at 256 running and 2,000 waiting jobs (`python -m benchmarks.decide`), once a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.types import WorkOption
from penstock.core.views import Chunk, JobView
from penstock.policy.batch import Decision, View
from penstock.policy.batch.vllm_v1 import Draft, decided, make_room


@dataclass(slots=True)
class Diffusion:
    max_tokens: int = 16384
    max_rows: int = 16384
    max_jobs: int = 512
    is_lockstep: bool = False
    _rows_left: int = field(init=False, default=0, repr=False)  # of the step being planned

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_rows", "max_jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def decide(self, view: View) -> Decision:
        if view.busy_lanes:
            return Decision(why="the lane is busy")
        draft = Draft(view.ledger.fork(), min(self.max_tokens, view.caps.max_batch_tokens))
        self._rows_left = self.max_rows
        is_open = self._walk_running(view, draft)
        if is_open and not draft.gone and not (self.is_lockstep and view.running):
            self._walk_waiting(view, draft)
        return decided(draft, tuple(draft.planned.values()))

    def _walk_running(self, view: View, draft: Draft) -> bool:
        """False when a running job did not fit: then nobody starts."""
        for job in view.running:
            options = job.frontier()
            if job.seq in draft.gone or not options:
                continue
            tokens = self._tokens(view, draft, options[0], options[0].tokens_max)
            if tokens < 1:
                return False
            upto = job.computed + job.in_flight + tokens
            upto = upto if options[0].holds is None else options[0].holds
            if draft.fork.reserve(job, upto) or make_room(view, draft, job, upto):
                self._plan(draft, job, tokens, options[0])
        return True

    def _walk_waiting(self, view: View, draft: Draft) -> None:
        most = min(self.max_jobs, view.caps.max_jobs) - len(view.running)
        for job in view.waiting:
            if len(draft.admitted) >= most:
                return
            option, fork = job.frontier()[0], draft.fork
            cached = fork.cached(job) if option.holds is None else 0
            most_tokens = job.known - cached if option.holds is None else option.tokens_max
            tokens = self._tokens(view, draft, option, most_tokens)
            if tokens < 1:
                return
            if option.holds is None:
                answer = view.admit(job, tokens, fork)
                if answer == "no":
                    continue
                if answer == "later":
                    draft.is_blocked = True
                    return
            upto = cached + tokens if option.holds is None else option.holds
            if not fork.reserve(job, upto):
                draft.is_blocked = True
                return
            draft.admitted.append(job)
            self._plan(draft, job, tokens, option)

    def _tokens(self, view: View, draft: Draft, option: WorkOption, most: int) -> int:
        """Of the piece as it is planned; 0 when it does not fit."""
        if option.phase == "extend":
            return min(most, draft.budget)
        is_first = not draft.planned and most <= view.caps.max_batch_tokens
        fits = most <= draft.budget and option.rows <= self._rows_left
        return most if fits or is_first else 0

    def _plan(self, draft: Draft, job: JobView, tokens: int, option: WorkOption) -> None:
        draft.planned[job.seq] = Chunk(job, tokens, None, option.phase)
        draft.budget -= tokens
        self._rows_left -= option.rows
