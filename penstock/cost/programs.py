"""What is still to come of an agent run: by the runs that ended and began alike.

Source: JITServe's matching of compound requests (UIUC-MLSys/JITServe, and readers' notes of the paper).

A run is a row of stages: calls that are under way together are one stage, and a call that arrives when none of its run
is begins the next. A run that ended is kept as a pattern: of each stage its prompts and answers in tokens, when it
ended and how long it was waited for. A run under way is compared, stage by stage, with all patterns that are at least
as long:

    distance = mean |log2 (1 + prompt) - log2 (1 + its prompt)|      of the stages begun
             + mean |log2 (1 + answer) - log2 (1 + its answer)|      of the stages ended

and the mean of the `matches` nearest ones tells how many stages, tokens and waits are left. JITServe takes the one best
match; several are steadier where runs of one kind differ in length.

Promises. The requests of a run are promised `deadline_s` each; it is due when it has had that much for every stage:

    deadline_at = start + (promised to the stages so far) * (stages expected) / (stages so far)
    due_at      = start + (deadline_at - start) * (share of the patterns' time that had gone when they ended this stage)

Nobody says that a run is over: one of which nothing was heard for `idle_s` is. Runs with a call that failed, was
cancelled or went on at another replica teach nothing. Each replica knows the calls that it served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penstock.core.events import Arrived, Event, Finished
from penstock.core.moving import Departed
from penstock.core.types import ProgramId
from penstock.core.views import JobView, Outlook

MOST_STAGES = 24  # of a pattern; what is behind counts as part of the last
MOST_SHARE = 0.9
PROMPT, ANSWER, PATH, ENDED, WAIT = range(5)


@dataclass(frozen=True, kw_only=True)
class Recall:
    """`window` patterns are remembered, and believed once `enough` fit. `idle_s`: silence after which a run is over."""

    window: int = 500
    enough: int = 4
    matches: int = 12
    idle_s: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.enough <= self.window:
            raise ValueError(f"enough must be from 1 to {self.window}, got {self.enough}")
        if self.matches < 1 or not self.idle_s > 0:
            raise ValueError("matches must be at least 1, and idle_s positive")


@dataclass(slots=True)
class Stage:
    """`path`: output tokens of its longest answer, which are written one after the other."""

    began_at: float
    wait_s: float
    num_prompt: int = 0
    num_output: int = 0
    path: int = 0
    deadline_s: float = 0.0
    ended_at: float = 0.0


@dataclass(slots=True)
class Run:
    """One program under way. `num_live`: its answers in progress."""

    id: str
    began_at: float
    stages: list[Stage] = field(default_factory=list)
    num_live: int = 0
    is_broken: bool = False
    outlook: Outlook | None = None


class SeenPrograms:
    """Implements core.views.Programs; learns by `observe`, which its replica calls with every event that it hears."""

    hears = (Arrived, Finished, Departed)

    def __init__(self, recall: Recall | None = None) -> None:
        self._recall = recall = recall or Recall()
        self._runs: dict[str, Run] = {}
        self._of: dict[str, tuple[Run, int]] = {}  # by request: its run, answers still to end
        self._table = np.zeros((recall.window, 5, MOST_STAGES))
        self._lengths = np.zeros(recall.window, dtype=np.intp)  # stages of each pattern
        self._num_kept = 0
        self._silent: dict[str, float] = {}  # since when nothing of a run is under way, by its id

    def observe(self, event: Event) -> None:
        if not self._of and type(event) is Finished:
            return  # nobody comes from an agent
        if isinstance(event, Arrived):
            if event.program is not None:
                self._arrive(event, event.program)
        elif isinstance(event, (Finished, Departed)) and event.request in self._of:
            self._end(event)

    def outlook(self, job: JobView) -> Outlook | None:
        program: ProgramId | None = job.request.program
        run = None if program is None else self._runs.get(program)
        return None if run is None else run.outlook

    @property
    def num_patterns(self) -> int:
        return min(self._num_kept, self._recall.window)

    # ---------------------------------------------------------------- hearing

    def _arrive(self, event: Arrived, program: str) -> None:
        self._forget_silent(event.at)
        run = self._runs.get(program)
        if run is None:
            run = self._runs[program] = Run(program, event.at)
        if not run.num_live:
            self._silent.pop(program, None)
            wait_s = event.at - run.stages[-1].ended_at if run.stages else 0.0
            run.stages.append(Stage(event.at, wait_s))
        stage = run.stages[-1]
        stage.num_prompt += event.num_prompt
        stage.deadline_s = max(stage.deadline_s, event.slo.deadline_s or 0.0)
        run.num_live += event.n
        self._of[event.request] = run, event.n
        run.outlook = self._foresee(run)

    def _end(self, event: Finished | Departed) -> None:
        run, left = self._of.pop(event.request)
        if left > 1:
            self._of[event.request] = run, left - 1
        stage = run.stages[-1]
        stage.ended_at = event.at
        if isinstance(event, Departed):
            run.is_broken = True
        else:
            stage.num_output += event.num_output
            stage.path = max(stage.path, event.num_output)
            run.is_broken |= event.reason not in ("stop", "length")
        run.num_live -= 1
        if not run.num_live:
            self._silent[run.id] = event.at

    def _forget_silent(self, now: float) -> None:
        """Runs that are over by now, longest silent first."""
        while self._silent:
            program = next(iter(self._silent))
            if now - self._silent[program] < self._recall.idle_s:
                return
            del self._silent[program]
            run = self._runs.pop(program)
            if not run.is_broken:
                self._keep(run)

    def _keep(self, run: Run) -> None:
        place = self._num_kept % self._recall.window
        self._num_kept += 1
        stages = run.stages[:MOST_STAGES]
        last = stages[-1]
        for extra in run.stages[MOST_STAGES:]:
            last.num_prompt += extra.num_prompt
            last.num_output += extra.num_output
            last.path += extra.path
            last.ended_at = extra.ended_at
        self._lengths[place] = len(stages)
        row = self._table[place]
        row[:] = 0.0
        for number, stage in enumerate(stages):
            ended_s = stage.ended_at - run.began_at
            row[:, number] = (stage.num_prompt, stage.num_output, stage.path, ended_s, stage.wait_s)

    # ---------------------------------------------------------------- foreseeing

    def _foresee(self, run: Run) -> Outlook | None:
        """None where nothing is promised."""
        stages = run.stages
        num, promised_s = len(stages), sum(stage.deadline_s for stage in stages)
        if not promised_s:
            return None
        done = float(sum(stage.num_output for stage in stages))
        near = self._nearest(stages)
        if near is None:
            due_at = run.began_at + promised_s
            return Outlook(0.0, 0.0, 0.0, 0.0, done, due_at, due_at)
        rows, lengths = self._table[near], self._lengths[near]
        ends = rows[np.arange(len(near)), ENDED, lengths - 1]
        gone = rows[:, ENDED, num - 1] / np.maximum(ends, 1e-9)
        each = rows[:, :, num:].sum(axis=2)
        left, paths = each.mean(axis=0), np.sort(each[:, PATH])
        more = float((lengths - num).mean())
        total_s = promised_s * (num + more) / num
        return Outlook(
            stages_left=more,
            tokens_left=float(left[PATH]),
            tokens_most=float(paths[min(len(paths) - 1, int(MOST_SHARE * (len(paths) + 1)))]),
            waits_s=float(left[WAIT]),
            others=done + float(left[ANSWER]),
            deadline_at=run.began_at + total_s,
            due_at=run.began_at + total_s * float(gone.mean()),
        )

    def _nearest(self, stages: Sequence[Stage]) -> NDArray[np.intp] | None:
        """Places of the patterns most like a run so far; None when too few are as long."""
        num, known = len(stages), self.num_patterns
        fit = np.flatnonzero(self._lengths[:known] >= num)
        if num > MOST_STAGES or len(fit) < self._recall.enough:
            return None
        rows = np.log2(1.0 + self._table[fit, :2, :num])
        prompts = np.log2([1.0 + stage.num_prompt for stage in stages])
        distance = np.abs(rows[:, PROMPT] - prompts).mean(axis=1)
        if num > 1:
            answers = np.log2([1.0 + stage.num_output for stage in stages[:-1]])
            distance += np.abs(rows[:, ANSWER, :-1] - answers).mean(axis=1)
        return fit[np.argsort(distance, kind="stable")[: self._recall.matches]]
